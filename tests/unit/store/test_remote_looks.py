import pytest

pytest.importorskip("obstore")

from aiohttp import web

from sllm_node.checkpoint.cards import REGISTERED
from sllm_node.core.config import RemoteConfig, StoreConfig
from sllm_node.core.errors import RemoteNotFoundError, RemoteUnreachableError
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import ModelId
from sllm_node.store.remote import RemoteTier
from sllm_node.store.remote_looks import REFRESH_S, RETRY_S
from tests.unit.store.remote_rig import Node, make_remote

A = ModelId("a")


@pytest.fixture
async def remote(tmp_path):
    made = make_remote(tmp_path / "remote", "abc")
    async with made.serving():
        yield made


def refusing(remote, *names):
    """Let `remote` answer as a bucket to who may not list it: what is not there is refused, and `names`."""

    async def before(request):
        name = request.match_info["file"]
        is_there = (remote.root / request.match_info["model"] / name).is_file()
        return web.Response(status=403) if name in names or not is_there else None

    remote.before = before


async def test_texts_that_a_remote_refuses_once_it_gave_the_index_are_not_there(tmp_path, remote):
    refusing(remote)
    async with Node(tmp_path / "n", {"r": {"url": remote.url, "models": ("a",)}}) as node:
        assert node.tier.status()[0]["problem"] is None
        texts = {path.name for path in node.catalog.get(A).path.glob("*.json")}
        assert texts == {"tensor_index.json", "card.json", "config.json", "tokenizer.json"}
        assert await node.load("a") == remote.bytes["a"]
        node.unload("a")


@pytest.mark.parametrize("name", ["tensor_index.json", "config.json"])
async def test_a_refused_index_or_config_is_told_as_a_matter_of_credentials(tmp_path, remote, name):
    refusing(remote, name)
    async with Node(tmp_path / "n", {"r": {"url": remote.url}}) as node:
        assert node.catalog.models() == ()
        problem = node.tier.status()[0]["problem"]
        assert problem.startswith(f"remote 'r': a/{name}: is refused, see the remote's credentials")


# --- one that can't be had, and the others --------------------------------------------------------


class Folder:
    """The files of a folder as a remote has them; those of `wrong` can't be had, and how."""

    def __init__(self, name, root):
        self.name, self.root = name, root
        self.wrong: dict[str, str] = {}
        self.asked: list[str] = []

    def models(self):
        return tuple(sorted(path.name for path in self.root.iterdir()))

    def read_all(self, path, limit, stop):
        self.asked.append(path)
        if (how := self.wrong.get(path)) is not None:
            raise RemoteUnreachableError(self.name, path, how, is_silent=how == "silent")
        if not (self.root / path).is_file():
            raise RemoteNotFoundError(self.name, path, "is not there")
        return (self.root / path).read_bytes()

    def indexes_asked(self):
        """Return of which models the index was asked since the last call, in that order."""
        asked, self.asked = self.asked, []
        return "".join(path[0] for path in asked if path.endswith("index.json"))


@pytest.fixture
async def looked_at(tmp_path):
    """A tier before the remote `r` of a folder, which has a, b and c."""
    make_remote(tmp_path / "remote", "abc")
    folder = Folder("r", tmp_path / "remote")
    tier = tier_before(tmp_path, r=folder)
    yield tier, folder
    await tier.close()


def tier_before(tmp_path, **folders):
    """Return a tier before remotes that are folders."""
    remotes = {name: RemoteConfig(f"http://{name}/x") for name in folders}
    return RemoteTier(
        remotes,
        StoreConfig(path=str(tmp_path)),
        Metrics(),
        connect=lambda name, config: folders[name],
    )


async def test_names_that_no_model_can_have_are_told_once(looked_at, caplog):
    tier, folder = looked_at
    (folder.root / "bad name").mkdir()
    for _ in range(2):
        await tier.refresh()
    told = [record.left_out for record in caplog.records if hasattr(record, "left_out")]
    assert told == [("bad name",)]
    (folder.root / ".logs").mkdir()
    folder.wrong["a/tensor_index.json"] = "silent"
    await tier.refresh()
    told = [record.left_out for record in caplog.records if hasattr(record, "left_out")]
    assert told == [("bad name",), (".logs", "bad name")]
    assert tier.cards.models() == ("a", "b", "c")


async def test_an_index_that_fails_costs_its_own_model_only(looked_at):
    tier, folder = looked_at
    folder.wrong["a/tensor_index.json"] = "500"
    await tier.refresh()
    assert tier.cards.models() == ("b", "c")
    status = tier.status()[0]
    assert (status["state"], status["problem"]) == ("ok", "remote 'r': a/tensor_index.json: 500")


async def test_a_remote_of_which_every_model_fails_is_down(looked_at):
    tier, folder = looked_at
    await tier.refresh()
    folder.wrong = {f"{model}/tensor_index.json": "503" for model in "abc"}
    await tier.refresh()
    assert tier.status()[0]["state"] == "down"
    assert tier.cards.models() == ("a", "b", "c")


async def test_a_silent_remote_is_asked_for_no_other_model_and_is_down(looked_at):
    tier, folder = looked_at
    folder.wrong = {f"{model}/tensor_index.json": "silent" for model in "abc"}
    await tier.refresh()
    assert folder.indexes_asked() == "a"
    assert tier.status()[0]["state"] == "down"


async def test_a_file_of_which_nothing_comes_hides_no_other_model_in_the_next_look(looked_at):
    tier, folder = looked_at
    folder.wrong["a/tokenizer.json"] = "silent"
    await tier.refresh()
    assert (folder.indexes_asked(), tier.cards.models()) == ("a", ())
    await tier.refresh()
    assert (folder.indexes_asked(), tier.cards.models()) == ("bca", ("b", "c"))
    assert tier.status()[0]["state"] == "ok"
    folder.wrong.clear()
    await tier.refresh()
    assert tier.cards.models() == ("a", "b", "c")
    await tier.refresh()
    assert folder.indexes_asked() == "bcaabc"
    assert tier.status()[0]["problem"] is None


async def test_a_model_that_fails_at_one_remote_is_had_from_another(tmp_path):
    for name in ("one", "two"):
        make_remote(tmp_path / name, "ab")
    one, two = Folder("one", tmp_path / "one"), Folder("two", tmp_path / "two")
    one.wrong["a/tensor_index.json"] = "500"
    tier = tier_before(tmp_path, one=one, two=two)
    await tier.refresh()
    assert [tier.cards.remote_of(model) for model in "ab"] == ["two", "one"]
    assert two.indexes_asked() == "a"
    await tier.close()


@pytest.mark.parametrize(
    ("wrong", "pause_s"), [("500", REFRESH_S), ("silent", RETRY_S), (None, REFRESH_S)]
)
async def test_only_remotes_that_are_down_are_looked_at_again_soon(looked_at, wrong, pause_s):
    tier, folder = looked_at
    assert tier._looks.pause_s() == RETRY_S
    if wrong is not None:
        folder.wrong["a/tensor_index.json"] = wrong
    await tier.refresh()
    assert tier._looks.pause_s() == pause_s


async def test_registered_models_with_a_problem_are_looked_at_again_soon(tmp_path):
    folder = Folder(REGISTERED, make_remote(tmp_path / "remote", "ab").root)
    store = StoreConfig(path=str(tmp_path))
    tier = RemoteTier({}, store, Metrics(), connect=lambda *_: folder)  # type: ignore[arg-type]
    folder.wrong["a/tensor_index.json"] = "500"
    await tier.register({A: "http://host/a", ModelId("b"): "http://host/b"})
    assert tier._looks.pause_s() == RETRY_S
    folder.wrong.clear()
    await tier.refresh()
    assert tier._looks.pause_s() == REFRESH_S
    await tier.close()
