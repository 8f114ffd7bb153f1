"""Why a load failed, in words for who waited for it."""

import logging

from sllm_node.checkpoint.catalog import Catalog
from sllm_node.core.errors import LoadFailedError, ModelNotFoundError, SllmError
from sllm_node.core.types import ModelId

log = logging.getLogger(__name__)


def foremost(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error that says most: one of ours if there is one."""
    for error in group.exceptions:
        if isinstance(error, SllmError):
            return error
    return group.exceptions[0]


def explain(catalog: Catalog, model: ModelId, error: BaseException) -> SllmError:
    """Log why a load failed and return what those who wait are told."""
    cause = _cause(catalog, model, error)
    if isinstance(cause, SllmError):
        log.warning("load failed", extra={"model": model, "code": cause.code, "error": str(cause)})
        return cause
    log.error("load failed", extra={"model": model}, exc_info=cause)
    failure = LoadFailedError(model, f"{type(cause).__name__}: {cause}")
    failure.__cause__ = cause
    return failure


def _cause(catalog: Catalog, model: ModelId, error: BaseException) -> BaseException:
    """Return `error`, unless the checkpoint is gone: of that each of its readers tells something else."""
    try:
        catalog.get(model)
    except ModelNotFoundError as gone:
        return gone
    except SllmError:
        return error
    return error
