import pytest

from sllm_node.core.errors import WishConflictError
from tests.unit.server.rig import serving


@pytest.fixture
async def rig():
    async with serving() as made:
        yield made


async def test_a_request_by_an_alias_is_the_models_own(rig):
    _, report, _ = await rig.post("/admin/aliases/gpt/set", {"model": "m"})
    assert report == {"alias": "gpt", "model": "m", "missed": ["c"]}
    status, answer, _ = await rig.post("/v1/completions", {"model": "gpt", "prompt": "x"})
    assert (status, answer["model"]) == (200, "m")
    assert rig.service.requests[0].model == "m"


async def test_aliases_are_listed_with_the_models(rig):
    await rig.post("/admin/aliases/org/gpt/set", {"model": "m"})
    _, listed, _ = await rig.get("/v1/models")
    assert [(one["id"], one["sllm"].get("alias_of")) for one in listed["data"]] == [
        ("m", None),
        ("org/gpt", "m"),
    ]
    _, one, _ = await rig.get("/v1/models/org/gpt")
    assert (one["id"], one["sllm"]["alias_of"]) == ("org/gpt", "m")


async def test_wishes_are_shown_and_taken_back(rig):
    await rig.post("/admin/aliases/gpt/set", {"model": "m"})
    body = {"minimum": 1, "maximum": 2}
    _, report, _ = await rig.post("/admin/models/m/scale", body)
    wish = {"model": "m", "minimum": 1, "maximum": 2, "keep_alive_s": 300.0}
    assert report == {**wish, "missed": ["c"]}
    _, shown, _ = await rig.get("/admin/wishes")
    assert shown == {"aliases": {"gpt": "m"}, "hidden": {}, "desired": [wish]}
    await rig.post("/admin/aliases/gpt/unset", {})
    await rig.post("/admin/models/m/unscale", {})
    _, shown, _ = await rig.get("/admin/wishes")
    assert shown == {"aliases": {}, "hidden": {}, "desired": []}


async def test_models_are_registered_and_forgotten(rig):
    url = "https://far/models"
    _, report, _ = await rig.post("/admin/models/new/register", {"url": url})
    assert report == {"model": "new", "url": url}
    assert rig.service.wishes.registered == {"new": url}
    _, report, _ = await rig.post("/admin/models/new/unregister", {})
    assert (report, rig.service.wishes.registered) == ({"model": "new"}, {})
    assert (await rig.post("/admin/models/new/register", {}))[0] == 400


@pytest.mark.parametrize(
    ("act", "done"),
    [
        ("load", [("load", "m")]), ("unload", [("unload", "m", False)]),
        ("pin", [("pin", "m"), ("load", "m")]), ("unpin", [("unpin", "m")]), ("pull", []),
    ],
)  # fmt: skip
async def test_operators_may_name_a_model_by_an_alias(rig, act, done):
    await rig.post("/admin/aliases/gpt/set", {"model": "m"})
    status, answer, _ = await rig.post(f"/admin/models/gpt/{act}", {})
    assert (status, answer["id"], rig.service.acts) == (200, "m", done)
    assert rig.pulled == (["m"] if act == "pull" else [])


async def test_aliases_that_do_not_count_are_shown(rig):
    rig.service.wishes.covered = {"n": "m"}
    _, shown, _ = await rig.get("/admin/wishes")
    assert (shown["aliases"], shown["hidden"]) == ({}, {"n": "m"})


async def test_a_wish_that_conflicts_is_told_so(rig):
    rig.service.wishes.error = WishConflictError("a model is called 'n'")
    status, answer, _ = await rig.post("/admin/aliases/n/set", {"model": "m"})
    assert (status, answer["error"]["code"]) == (409, "wish_conflict")


@pytest.mark.parametrize("body", [{}, {"minimum": 1}, {"minimum": "a", "maximum": 1}])
async def test_a_body_without_numbers_is_refused(rig, body):
    assert (await rig.post("/admin/models/m/scale", body))[0] == 400
