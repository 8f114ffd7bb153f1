"""Other names of models: which of them count, as a model may have come that is called so."""

import logging
from collections.abc import Callable

from sllm_node.cluster.journal import Journal
from sllm_node.cluster.records import Alias
from sllm_node.core.errors import ModelNotFoundError, SllmError, WishConflictError

log = logging.getLogger(__name__)


class Aliases:
    """Those that this node keeps."""

    def __init__(self, journal: Journal, find: Callable[[str], object]) -> None:
        """`find` returns a model that some node has, or raises ModelNotFoundError."""
        self._journal = journal
        self._find = find
        self._told_hidden: set[str] = set()
        """Those of which the log has that they don't count."""

    def resolve(self, name: str) -> str:
        """Return the model that clients mean by `name`: one that is called so, or else what an alias says."""
        alias = self._journal.records.aliases.get(name)
        return name if alias is None or self._is_hidden(alias) else alias.model

    def all(self) -> dict[str, str]:
        """Return the model behind each alias that counts."""
        found = sorted(self._journal.records.aliases.items())
        return {name: one.model for name, one in found if not self._is_hidden(one)}

    def hidden(self) -> dict[str, str]:
        """Return the model behind each alias that does not count, as a model is called so."""
        found = sorted(self._journal.records.aliases.items())
        return {name: one.model for name, one in found if self._is_hidden(one)}

    def check_no_alias(self, model: str) -> None:
        """See that `model` is the name of no alias.

        Raises:
            WishConflictError: it is.
        """
        if (meant := self.resolve(model)) != model:
            raise WishConflictError(f"{model!r} is an alias of {meant!r}; name the model itself")

    def is_model(self, name: str) -> bool:
        """Tell whether a model is called so."""
        try:
            self._find(name)
        except ModelNotFoundError:
            return False
        except SllmError:  # it lies here and is damaged
            return True
        return True

    def _is_hidden(self, alias: Alias) -> bool:
        """Tell whether there is a model of an alias' name: it came later, or a peer did not know of it."""
        if not self.is_model(alias.name):
            self._told_hidden.discard(alias.name)
            return False
        if alias.name not in self._told_hidden:
            self._told_hidden.add(alias.name)
            fields = {"alias": alias.name, "model": alias.model}
            log.warning("alias does not count: a model has its name", extra=fields)
        return True
