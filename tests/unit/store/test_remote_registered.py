import asyncio
from threading import Event
from types import SimpleNamespace

import pytest

from sllm_node.core.clock import ManualClock
from sllm_node.core.config import RemoteConfig, StoreConfig
from sllm_node.core.errors import RemoteNotFoundError, RemoteUnreachableError
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import ModelId
from sllm_node.store.remote import RemoteTier
from sllm_node.store.remote_registered import RegisteredFiles


class Looks:
    """Looks at registered models; some hosts are silent, each for `silence_s`."""

    def __init__(self, urls, silent, silence_s=1.0):
        self.clock = ManualClock()
        self.files = RegisteredFiles(lambda name, config: None, self.clock)  # type: ignore[arg-type, return-value]
        self.files.set({ModelId(model): url for model, url in urls.items()})
        self.urls, self.silent, self.silence_s = urls, silent, silence_s
        self.failing = ""
        self.asked: list[str] = []

    def look(self, model):
        self.asked.append(model)
        if model in self.failing:
            raise RemoteUnreachableError("r", model, "503")
        if model in self.silent:
            self.clock.advance(self.silence_s)
            raise RemoteUnreachableError("r", model, "no answer in time", is_silent=True)
        return

    def again(self):
        """Return who is asked in one look, and what is wrong then."""
        self.asked = []
        wrong = self.files.look(sorted(self.urls), self.look)
        return "".join(self.asked), wrong


def test_a_silent_host_is_asked_once_in_a_look_and_keeps_no_other_waiting():
    urls = dict.fromkeys("abc", "http://silent/x") | dict.fromkeys("de", "http://well/x")
    looks = Looks(urls, "abc")
    asked, wrong = looks.again()
    assert asked == "ade"
    assert wrong == ["remote 'r': a: no answer in time"]


def test_who_is_silent_is_asked_behind_all_others_and_in_turn():
    looks = Looks(dict.fromkeys("abcd", "http://host/x"), "ab")
    assert [looks.again()[0] for _ in range(3)] == ["a", "b", "cda"]
    looks.silent = ""
    asked, wrong = looks.again()
    assert (asked, wrong) == ("cdba", [])


def test_a_host_that_answers_with_a_failure_is_asked_for_its_other_models():
    looks = Looks(dict.fromkeys("abc", "http://host/x"), "")
    looks.failing = "a"
    assert looks.again() == ("abc", ["remote 'r': a: 503"])


def test_a_look_ends_when_it_has_waited_for_silent_hosts_and_the_next_one_begins_with_the_others():
    looks = Looks({model: f"http://{model}/x" for model in "abcdefgh"}, "abcd", silence_s=10.0)
    assert [looks.again()[0] for _ in range(4)] == ["ab", "cd", "efghab", "efghcd"]


def test_an_address_of_no_host_is_looked_at_as_any_other():
    assert Looks({"a": "http://[::1/x", "b": "http://host/x"}, "").again() == ("ab", [])


def test_what_is_not_registered_any_more_is_wrong_no_more():
    looks = Looks(dict.fromkeys("ab", "http://host/x"), "a")
    assert looks.again()[1] != []
    del looks.urls["a"]
    assert looks.again() == ("b", [])


def test_models_may_be_opened_by_threads_while_others_are_registered():
    class Content:
        def read_all(self, path, limit, stop):
            return b""

    class Url(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other):
            files.read_all("b/x", 1, Event())  # as a thread would in this moment
            return str.__eq__(self, other)

    files = RegisteredFiles(lambda name, config: Content(), ManualClock())  # type: ignore[arg-type, return-value]
    a, b = ModelId("a"), ModelId("b")
    files.set({a: Url("http://host/x")})
    files.read_all("a/x", 1, Event())
    files.set({a: "http://host/x", b: "http://host/y"})
    assert files.models() == ("a", "b")


@pytest.mark.parametrize("is_registered", [True, False])
async def test_a_node_that_stops_asks_a_remote_for_nothing_more(tmp_path, is_registered):
    """Its look at remotes is at the first of many models."""
    loop, asked, go_on = asyncio.get_running_loop(), asyncio.Event(), Event()
    paths = []

    class Slow:
        def __init__(self, name, config):
            self.name, self._models = name, config.models

        def models(self):
            return self._models

        def read_all(self, path, limit, stop):
            paths.append(path)
            loop.call_soon_threadsafe(asked.set)
            go_on.wait()
            raise RemoteNotFoundError(self.name, path, "is not there")

    config = {} if is_registered else {"r": RemoteConfig("http://host/x", models=("a", "b"))}
    tier = RemoteTier(config, StoreConfig(path=str(tmp_path)), Metrics(), connect=Slow)  # type: ignore[arg-type]
    urls = {ModelId("a"): "http://a/x", ModelId("b"): "http://b/x"} if is_registered else {}
    looking = asyncio.create_task(tier.register(urls))
    await asked.wait()
    closing = asyncio.create_task(tier.close())
    await asyncio.sleep(0)
    go_on.set()
    await asyncio.gather(looking, closing)
    assert paths == ["a/tensor_index.json"]


def test_a_url_is_shown_without_what_is_secret(tmp_path):
    config = {"r": RemoteConfig("http://user:p@host/x?sig=y", models=("a",))}
    files = SimpleNamespace(name="r")
    tier = RemoteTier(
        config,
        StoreConfig(path=str(tmp_path)),
        Metrics(),
        connect=lambda *_: files,
    )
    assert tier.status()[0]["url"] == "http://host/x"
