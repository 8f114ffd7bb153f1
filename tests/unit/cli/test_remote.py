"""Commands to a running node, against a canned one on loopback."""

import asyncio
import json
import threading
from typing import Any

import pytest
from aiohttp import web
from typer.testing import CliRunner

from sllm_node.cli.main import app

REPORT: dict[str, Any] = {
    "node": {"id": "n1", "version": "0.1.0", "state": "serving", "uptime_s": 12.0},
    "models": [
        {
            "id": "alpha", "state": "loading", "tier": "nvme", "bytes": 4096, "pinned": True,
            "bytes_by_tier": {"device": 0, "dram": 1024, "nvme": 2048, "remote": 4096},
            "running": 0, "waiting": 2,
            "keep_alive_until_s": 30.0, "devices": ["cpu"], "stalled_s": None,
            "progress": {"bytes_done": 1024, "bytes_total": 4096, "eta_s": 1.5},
        }
    ],
    "devices": [{"name": "cpu", "used": 1 << 20, "cached": 1 << 10, "total": 1 << 30}],
    "pool": {"used": 1, "chunks": 4, "chunk_bytes": 1 << 20},
    "bandwidth": {"nvme": 1.5e9, "dram": None},
    "unusable": {"broken": "broken/shard-00000.bin: is too short"},
    "failures": [{"model": "alpha", "error": "it was damaged", "code": "c", "age_s": 61.2}],
    "remotes": [
        {
            "name": "far", "url": "http://far/x", "state": "down", "problem": "gone",
            "models": ["a"], "not_offered": ["b"],
        }
    ],
    "sessions": [
        {
            "session": "r-1-0", "model": "alpha", "state": "waiting", "prompt_tokens": 7,
            "generated_tokens": 0, "age_s": 0.5, "entry": "entry-b", "node": None,
        }
    ],
}  # fmt: skip


class CannedNode:
    """Answers every request with what it was given and remembers what came."""

    def __init__(self):
        self.seen = []
        self.port = 0
        self.url = ""
        self.answer = (200, {})

    async def handle(self, request):
        body = await request.text()
        self.seen.append((request.method, request.path, request.headers.get("Authorization"), body))
        status, value = self.answer
        return web.json_response(value, status=status)


@pytest.fixture
def node():
    canned = CannedNode()
    loop = asyncio.new_event_loop()
    application = web.Application()
    application.router.add_route("*", "/{tail:.*}", canned.handle)
    runner = web.AppRunner(application)
    loop.run_until_complete(runner.setup())
    site = web.TCPSite(runner, "127.0.0.1", 0)
    loop.run_until_complete(site.start())
    canned.port = runner.addresses[0][1]
    canned.url = f"http://127.0.0.1:{canned.port}"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield canned
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def run(*arguments):
    return CliRunner().invoke(app, arguments)


def test_status_shows_models_device_pool_and_sessions(node):
    node.answer = (200, REPORT)
    shown = run("status", "--url", node.url).stdout
    for part in (
        "n1",
        "alpha",
        "loading",
        "pinned, 25 %, 1.5 s left, on cpu",
        "1.0 MiB of 1.0 GiB used, 1.0 KiB cached",
        "50 % fetched",
        "remote far (http://far/x): down, 1 models: gone",
        "not offered at the moment, bytes kept (rm deletes them): b",
        "1 of 4 chunks",
        "1.50 GB/s",
        "r-1-0",
        "entry-b",
        "not usable: broken: broken/shard-00000.bin: is too short",
        "alpha: its last load failed 61 s ago: it was damaged",
    ):
        assert part in shown


def test_status_as_json_is_the_report(node):
    node.answer = (200, REPORT)
    assert json.loads(run("status", "--url", node.url, "--json").stdout) == REPORT


CLUSTER: dict[str, Any] = {
    "me": "a", "version": 3, "problem": "node 'b' knew a later life of this node",
    "peers": [
        {"id": "b", "address": "10.0.0.2:8100", "state": "alive", "age_s": 0.5, "boot": 1, "version": 2,
         "heard_s": 0.75, "why": ""},
        {"id": "c", "address": "10.0.0.3:8100", "state": "dead", "age_s": None, "boot": 0, "version": 0,
         "heard_s": None, "why": "never heard, for 12.0 s (dead after 10 s)", "problem": "refuses our key"},
    ],
    "nodes": [
        {
            "id": name, "draining": False, "sessions": 4,
            "served": [
                {
                    "session": f"r-{name}-0", "model": "alpha", "entry": "entry-c",
                    "prompt_tokens": 5, "generated_tokens": 6,
                }
            ],
            "devices": [{"name": "cpu", "free": 1 << 30, "total": 2 << 30}],
            "models": [
                {"id": "alpha", "bytes": 1 << 20, "dram": dram, "nvme": 1 << 20, "device": False}
            ],
        }
        for name, dram in (("a", 0), ("b", 1 << 20))
    ],
    "scaling": [], "differing": {"alpha": [["b"], ["a"]]},
    "migrations": [
        {
            "session": "r-7-0", "origin": "a", "to": "b", "reason": "placement", "vacate": "r-9-0",
            "outcome": "moved", "gap_s": 0.0417,
        },
    ],
    "vacates": [
        {
            "model": "beta", "vacate": "r-9-0", "replicas": ["alpha"], "to": ["b"], "sessions": 3,
            "outcome": "freed", "seconds": 0.25,
        },
    ],
    "directory": {
        "endpoint": "http://10.0.0.9:2379", "state": "following", "registered": True,
        "nodes": ["b"], "problem": None,
    },
    "estimates": {"count": 7, "mean_error_s": 0.25, "bias_s": 0.1, "worst_s": 0.5},
}  # fmt: skip


def test_status_of_the_cluster_shows_nodes_models_by_tier_and_estimates(node):
    node.answer = (200, {**REPORT, "cluster": CLUSTER})
    shown = run("status", "--cluster", "--url", node.url).stdout
    for part in (
        "this node", "10.0.0.2:8100", "dead", "1.0 GiB", "dram", "nvme", "off by 0.250 s",
        "this node: node 'b' knew a later life", "r-b-0", "entry-c", "0.8", "never heard, for 12.0 s (dead after 10 s)",
        "10.0.0.9:2379: following", "c: refuses our key", "a to b", "placement", "42", "beta", "freed", "0.250",
        "alpha: nodes have different checkpoints: b; a (the newest first)",
    ):  # fmt: skip
        assert part in shown
    whole = run("status", "--cluster", "--json", "--url", node.url).stdout
    assert json.loads(whole) == CLUSTER


def test_what_a_node_of_an_older_release_does_not_tell_is_shown_as_unknown(node):
    peers = [
        {k: v for k, v in one.items() if k not in ("heard_s", "why")} for one in CLUSTER["peers"]
    ]
    nodes = [{k: v for k, v in one.items() if k != "served"} for one in CLUSTER["nodes"]]
    node.answer = (200, {**REPORT, "cluster": {**CLUSTER, "peers": peers, "nodes": nodes}})
    done = run("status", "--cluster", "--url", node.url)
    assert (done.exit_code, "sessions: unknown" in done.output) == (0, True)
    (line,) = [line for line in done.output.splitlines() if "10.0.0.2:8100" in line]
    assert line.split()[-1] == "?"
    assert line.count("?") == 2


def test_status_of_the_cluster_of_a_node_that_is_alone_says_so(node):
    node.answer = (200, REPORT)
    done = run("status", "--cluster", "--url", node.url)
    assert (done.exit_code, "in no cluster" in done.output) == (1, True)


@pytest.mark.parametrize("verb", ["load", "unload", "pull", "pin", "unpin"])
def test_acts_on_a_model_are_posted_and_its_state_told(node, verb):
    node.answer = (200, {"state": "ready"})
    done = run(verb, "a/b", "--url", node.url, "--key", "k")
    assert done.stdout == "a/b: ready\n"
    method, path, key, _ = node.seen[0]
    assert (method, path, key) == ("POST", f"/admin/models/a/b/{verb}", "Bearer k")


def test_force_is_passed_on(node):
    run("unload", "m", "--force", "--url", node.url)
    assert json.loads(node.seen[0][3]) == {"force": True}


def test_cancel_and_drain(node):
    node.answer = (200, {"cancelled": 2, "draining": True})
    assert "2 sessions" in run("cancel", "r-1", "--url", node.url).stdout
    assert run("drain", "--url", node.url).stdout.startswith("draining;")
    assert run("undrain", "--url", node.url).stdout == "serving\n"
    assert run("cancel", "a?b#c", "--url", node.url).exit_code == 0
    assert [path for _, path, _, _ in node.seen[1:3]] == ["/admin/drain", "/admin/undrain"]
    assert node.seen[3][1] == "/admin/requests/a?b#c/cancel"


def test_address_and_key_can_come_from_the_nodes_config(node, tmp_path):
    config = tmp_path / "node.toml"
    config.write_text(f'[server]\nport = {node.port}\napi_keys = ["a"]\nadmin_keys = ["b"]\n')
    run("drain", "--config", str(config))
    assert node.seen[0][2] == "Bearer b"


def test_a_key_is_sent_without_the_space_around_it(node):
    run("drain", "--url", node.url, "--key", " secret\n")
    assert node.seen[-1][2] == "Bearer secret"


def test_a_key_that_no_header_can_carry_is_told_before_anybody_is_asked(node):
    done = run("drain", "--url", node.url, "--key", "sec\nret")
    assert (done.exit_code, "the key has control characters" in done.stderr) == (1, True)
    assert (node.seen, "ret" in done.stderr) == ([], False)


def test_the_address_in_a_config_may_be_of_ipv6(tmp_path):
    config = tmp_path / "node.toml"
    config.write_text('[server]\nhost = "::1"\nport = 1\n')
    assert "no node answers at http://[::1]:1/" in run("drain", "--config", str(config)).stderr


def test_the_nodes_own_error_is_what_the_operator_reads(node):
    node.answer = (404, {"error": {"message": "there is no model named 'x' here"}})
    done = run("load", "x", "--url", node.url)
    assert done.exit_code == 1
    assert done.stderr == "sllm-node: there is no model named 'x' here\n"


@pytest.mark.parametrize("command", [("status",), ("cancel", "r-1"), ("load", "m"), ("drain",)])
@pytest.mark.parametrize(
    "answer",
    [
        (200, "hello"), (200, {"status": "ok"}), (200, {}), (404, {"error": "not found"}),
        (404, {"error": None}), (404, {"detail": "Not Found"}), (401, {"error": {"message": None}}),
    ],
)  # fmt: skip
def test_something_else_that_answers_is_no_node(node, command, answer):
    node.answer = answer
    done = run(*command, "--url", node.url)
    assert type(done.exception) is SystemExit
    assert (done.exit_code, done.stdout) == (1, "")
    assert f"(status {answer[0]}) is no sllm_node; name the node's address: --url" in done.stderr


def test_a_refused_key_is_told_with_where_to_give_one(node):
    node.answer = (401, {"error": {"message": "the key is not known"}})
    done = run("drain", "--url", node.url)
    assert done.stderr.startswith("sllm-node: the key is not known (--key, SLLM_NODE_KEY")


@pytest.mark.parametrize("given", ["[/x]", "[red]x", ":smile:"])
def test_a_session_with_an_id_of_its_client_is_shown_as_cancel_takes_it(node, given):
    node.answer = (200, {**REPORT, "sessions": [{**REPORT["sessions"][0], "session": given}]})
    done = run("status", "--url", node.url)
    assert (done.exit_code, given in done.stdout.split()) == (0, True)
    node.answer = (200, {"cancelled": 1})
    run("cancel", given, "--url", node.url)
    assert node.seen[-1][1] == f"/admin/requests/{given}/cancel"


def test_a_node_that_is_not_there_is_one_sentence():
    done = run("status", "--url", "http://127.0.0.1:1")
    assert done.exit_code == 1
    assert done.stderr.startswith("sllm-node: no node answers at http://127.0.0.1:1")


def test_what_keeps_tls_from_a_node_is_told_in_its_words(node):
    done = run("status", "--url", node.url.replace("http:", "https:"))
    assert ("[SSL:" in done.stderr, "not permitted" in done.stderr) == (True, False)


def test_what_is_no_url_is_told():
    done = run("status", "--url", "ftp://banana")
    assert (done.exit_code, "no URL" in done.stderr) == (1, True)


def test_an_address_without_a_scheme_is_http(node):
    node.answer = (200, {"draining": True})
    assert run("drain", "--url", f"127.0.0.1:{node.port}").stdout.startswith("draining")


def test_a_request_that_is_not_there_is_not_cancelled(node):
    node.answer = (200, {"cancelled": 0})
    done = run("cancel", "r-1", "--url", node.url)
    assert (done.exit_code, "no session of request r-1" in done.stderr) == (1, True)


# --- sllm-node cluster ----------------------------------------------------------------------------


def test_replicas_and_aliases_are_wished_for_on_a_running_node(node):
    node.answer = (200, {"model": "m", "minimum": 1, "maximum": 3, "missed": []})
    result = run("cluster", "scale", "m", "1-3", "--url", node.url)
    assert (result.exit_code, result.output) == (0, "m: 1 to 3 replicas\n")
    assert node.seen[-1][:2] == ("POST", "/admin/models/m/scale")
    assert json.loads(node.seen[-1][3]) == {"minimum": 1, "maximum": 3, "keep_alive_s": 300.0}
    run("cluster", "unscale", "m", "--url", node.url)
    assert node.seen[-1][1] == "/admin/models/m/unscale"
    run("cluster", "alias", "gpt", "m", "--url", node.url)
    assert (node.seen[-1][1], json.loads(node.seen[-1][3])) == (
        "/admin/aliases/gpt/set",
        {"model": "m"},
    )
    assert run("cluster", "unalias", "gpt", "--url", node.url).output == "gpt: forgotten\n"


def test_a_model_is_registered_on_a_running_node(node):
    node.answer = (200, {"model": "m", "url": "https://far/x"})
    done = run("cluster", "register", "m", "https://far/x", "--url", node.url)
    assert (done.exit_code, done.output) == (0, "m: registered at https://far/x\n")
    assert node.seen[-1][:2] == ("POST", "/admin/models/m/register")
    assert json.loads(node.seen[-1][3]) == {"url": "https://far/x"}
    done = run("cluster", "unregister", "m", "--url", node.url)
    assert (done.output, node.seen[-1][1]) == (
        "m: not registered any more\n",
        "/admin/models/m/unregister",
    )


def test_nodes_that_do_not_know_of_a_wish_yet_are_named(node):
    node.answer = (200, {"alias": "gpt", "model": "m", "missed": ["c"]})
    result = run("cluster", "alias", "gpt", "m", "--url", node.url)
    assert result.exit_code == 1
    assert "not told: c" in result.stderr


@pytest.mark.parametrize("replicas", ["three", "1-x", "1-", "-2", "", "²", "1-²", "9" * 5000])
def test_replicas_that_are_no_numbers_are_refused(node, replicas):
    result = run("cluster", "scale", "m", "--url", node.url, "--", replicas)
    assert (result.exit_code, "is not MIN-MAX, as in 1-3" in result.stderr) == (1, True)
    assert (node.seen, len(result.stderr) < 100) == ([], True)


def test_a_name_that_is_no_text_is_asked_for_byte_by_byte(node):
    node.answer = (404, {"error": {"message": "there is no such model"}})
    done = run("load", "a\udcff", "--url", node.url)
    assert done.stderr == "sllm-node: there is no such model\n"
    assert node.seen[0][1].startswith("/admin/models/a")


def test_models_of_a_cluster_are_shown_with_what_is_desired(node):
    report = {
        "nodes": [
            {"id": "a", "models": [{"id": "m", "device": True}]},
            {"id": "b", "models": [{"id": "m", "device": False}, {"id": "n", "device": False}]},
        ],
        "scaling": [{"model": "m", "minimum": 1, "maximum": 3, "ready": 1}],
    }
    node.answer = (200, {**REPORT, "cluster": report, "aliases": {"gpt": "m"}})
    result = run("cluster", "models", "--url", node.url)
    rows = [line.split() for line in result.output.splitlines()]
    assert [row for row in rows if row and row[0] in ("m", "n")] == [
        ["m", "a", "b", "a", "1", "1-3", "gpt"],
        ["n", "b", "0"],
    ]
    found = json.loads(run("cluster", "models", "--json", "--url", node.url).output)
    assert found["models"][0] == {
        "id": "m", "nodes": ["a", "b"], "on_device": ["a"], "ready": 1,
        "desired": {"minimum": 1, "maximum": 3}, "aliases": ["gpt"],
    }  # fmt: skip
    assert found["hidden_aliases"] == {}


def test_an_alias_that_does_not_count_is_told_with_the_models(node):
    node.answer = (200, {
        **REPORT, "cluster": {"nodes": [], "scaling": []}, "aliases": {}, "hidden": {"n": "m"},
    })  # fmt: skip
    result = run("cluster", "models", "--url", node.url)
    assert "the alias n of m does not count: a model is called n" in result.stderr
    found = json.loads(run("cluster", "models", "--json", "--url", node.url).output)
    assert found["hidden_aliases"] == {"n": "m"}
