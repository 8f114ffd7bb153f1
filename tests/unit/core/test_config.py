from pathlib import Path
from typing import get_args, get_origin

import msgspec
import pytest

from sllm_node.checkpoint.sinks import RAW_CHUNK_BYTES
from sllm_node.core.config import Config, config_schema, load_config, parse_config
from sllm_node.core.errors import ConfigError
from sllm_node.core.units import MIB

CONFIGS = Path(__file__).parents[3] / "configs"


def problems(text):
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    return caught.value.problems


def test_an_empty_file_is_the_default_configuration():
    assert parse_config("") == Config()


def test_node_toml_states_the_defaults():
    assert load_config(CONFIGS / "node.toml") == Config()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_every_shipped_config_is_valid(path):
    if path.name.startswith("simulation"):  # what `simulate` reads; its tests run it
        with pytest.raises(ConfigError):
            load_config(path)
    else:
        load_config(path)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_every_shipped_config_serves_what_is_converted_by_default(path):
    if not path.name.startswith("simulation"):
        assert load_config(path).store.chunk_bytes % RAW_CHUNK_BYTES == 0


@pytest.mark.parametrize(
    ("line", "least", "most"),
    [
        ("[models.a]\npriority = {}", -(2**31), 2**31 - 1),
        ("[engine]\ntorch_threads = {}", 0, 1024),
        ("[store]\nreader_threads = {}", 1, 1024),
        ("[remotes.r]\nurl = 'https://far'\nfetch_threads = {}", 1, 1024),
        ("[schedule]\nmax_queue = {}", 1, 1_000_000),
        ("[store]\nrelay_max_sessions = {}", 0, 1_000_000),
    ],
)
def test_a_number_has_a_smallest_and_a_largest_value(line, least, most):
    for good in (least, most):
        parse_config(line.format(good))
    for bad in (least - 1, most + 1, 10**20):
        (problem,) = problems(line.format(bad))
        assert f" = {bad}: Expected `int` " in problem


def test_no_number_of_the_file_is_without_an_end():
    """What is above 64 bits ends in no JSON, and what counts things is made of each of them."""
    for table in msgspec.structs.fields(Config):
        kind = get_args(table.type)[1] if get_origin(table.type) is dict else table.type
        for field in msgspec.structs.fields(kind):
            assert field.type is not int, field.name
            for bound in get_args(field.type)[1:] if get_args(field.type)[:1] == (int,) else ():
                assert None not in (bound.ge, bound.le), field.name


@pytest.mark.parametrize(
    "line",
    [
        '[store]\npath = "a\\u0000b"', '[node]\njournal = "\\u0000"',
        '[cluster]\nfile = "c\\u0000"',
    ],
)  # fmt: skip
def test_text_with_a_nul_is_refused(line):
    (problem,) = problems(line)
    assert problem.endswith(": has a NUL character, which no path can have; remove it")


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    file = tmp_path / "node.toml"
    file.write_bytes(b'\xef\xbb\xbf[node]\nid = "n"\n')
    assert load_config(file).node.id == "n"


def test_every_problem_is_reported_at_once_with_its_key():
    found = problems(
        '[node]\nidd = "x"\ndrain_s = "soon"\n[store]\npool_bytes = "much"\n'
        "[models.a]\npinned = 3\n[serve]\n"
    )
    assert [problem.split(":")[0].split(" =")[0] for problem in found] == [
        "node.idd", "node.drain_s", "store.pool_bytes", "models.a.pinned", "serve",
    ]  # fmt: skip


def test_contradictions_are_told_beside_mistakes():
    found = problems(
        '[server]\nhost = "0.0.0.0"\nport = "x"\n[models.a]\nkeep_alive_s = -2\nfoo = 1'
    )
    keys = [problem.split(" =")[0].split(":")[0] for problem in found]
    assert keys == ["server.port", "models.a.foo", "server.host", "models.a.keep_alive_s"]


def test_a_mistyped_key_is_answered_with_the_nearest_one():
    assert problems("[store]\npool_byte = 1")[0].endswith("did you mean 'pool_bytes'?")


@pytest.mark.parametrize("digits", [400, 5000])
@pytest.mark.parametrize("quote", ['"', ""])
def test_a_size_of_very_many_digits_is_a_config_error(digits, quote):
    (told, *_) = problems(f"[store]\npool_bytes = {quote}{'9' * digits}{quote}\n")
    assert "store.pool_bytes = " in told or "is no TOML" in told
    assert len(told) < 200


def test_sizes_may_carry_units():
    assert parse_config('[store]\nchunk_bytes = "4MiB"').store.chunk_bytes == 4 * MIB


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[store]\nchunk_bytes = 5000", "store.chunk_bytes"),
        ('[store]\npool_bytes = "16MiB"', "store.pool_bytes"),
        ("[store]\npool_bytes = true", "store.pool_bytes"),
        ("[store]\npool_bytes = 1.5", "store.pool_bytes"),
        ('[server]\nhost = "0.0.0.0"', "server.host"),
        ("[server]\nmax_body_bytes = 0", "server.max_body_bytes = 0: must be 1 byte at least"),
        ("[schedule]\nkeep_alive_s = -2", "schedule.keep_alive_s"),
        ("[models.a]\nkeep_alive_s = -2", "models.a.keep_alive_s"),
        ("[engine]\nprefill_beside_ratio = 0.5", "engine.prefill_beside_ratio"),
        ('[device]\nnames = ["tpu"]', "device.names"),
        ('[device]\nnames = ["cpu", "cuda:0"]', "device.names mixes kinds"),
        (
            '[device]\nnames = ["cuda:1", "cuda:1"]',
            "device.names = ['cuda:1', 'cuda:1']: names a device twice",
        ),
        ('[device]\nname = "cpu"', "device.name: unknown key; did you mean 'names'?"),
        ('[engine]\nkv_cache_bytes = "8GiB"', "engine.kv_cache_bytes"),
        ('[engine]\nkv_offload = true\nkv_offload_bytes = "8MiB"', "engine.kv_offload_bytes"),
        ('[engine]\nkv_offload = true\nkv_offload_bytes = "4GiB"', "engine.kv_offload_bytes"),
        ("node = 3", "node"),
        ("models = 3", "models"),
        ("[models]\na = 3", "models.a"),
    ],
)
def test_a_value_that_contradicts_is_refused_by_name(text, key):
    assert problems(text)[0].startswith(key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in ("listen", "address") for value in
          ("10.0.0.1:99999", "10.0.0.1:0", "10.0.0.1", "[1:2]:8100")),
        ("address", "0.0.0.0:8100"),
    ],
)  # fmt: skip
def test_an_address_that_peers_can_not_call_is_refused(key, value):
    (told,) = problems(f'[cluster]\nfile = "f"\n{key} = "{value}"\n')
    assert told.startswith(f"cluster.{key} = {value!r}: ")


def test_a_node_may_listen_on_all_interfaces():
    text = '[cluster]\nfile = "f"\nlisten = "0.0.0.0:8100"\n'
    assert parse_config(text).cluster.listen == "0.0.0.0:8100"


@pytest.mark.parametrize("key", [
    "node.drain_s", "engine.stall_after_s", "engine.prefill_beside_ratio", "schedule.keep_alive_s",
    "schedule.max_wait_s", "server.read_timeout_s", "models.m.keep_alive_s",
])  # fmt: skip
@pytest.mark.parametrize("value", ["inf", "nan", "1e300"])
def test_a_number_without_an_end_is_refused(key, value):
    table, _, field = key.rpartition(".")
    assert problems(f"[{table}]\n{field} = {value}\n")[0].startswith(f"{key} = ")


@pytest.mark.parametrize("extra", ['api_keys = ["k"]', "allow_unauthenticated_remote = true"])
def test_listening_to_other_machines_needs_a_key_or_the_explicit_word(extra):
    assert parse_config(f'[server]\nhost = "0.0.0.0"\n{extra}').server.host == "0.0.0.0"


@pytest.mark.parametrize("key", ["api_keys", "admin_keys"])
@pytest.mark.parametrize(
    "value", [" secret", "secret ", r"secret\n", r"sec\nret", r"sec\u0000ret", r"\u00a0secret", " "]
)
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(key, value):
    (told,) = problems(f'[server]\n{key} = ["good", "{value}"]\n')
    assert told.startswith(f"server.{key}[1]: ")
    assert "secret" not in told


def test_a_key_may_have_a_space_within():
    assert parse_config('[server]\napi_keys = ["a b"]\n').server.api_keys == ("a b",)


def test_text_that_is_no_toml_is_refused():
    assert "is no TOML" in problems("[node")[0]


def test_a_missing_or_unreadable_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="can't be read"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b'id = "\xe9"')
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "latin.toml")


def test_the_error_counts_and_lists_its_problems():
    assert str(ConfigError("f", ("a", "b"))) == "f: 2 problems\n  a\n  b"


def test_the_schema_describes_every_table():
    schema = config_schema()
    tables = schema["$defs"]["Config"]["properties"]
    assert set(tables) == {field.name for field in msgspec.structs.fields(Config)}


REMOTE = '[remotes.far]\nurl = "http://h/p"\n'


def test_remotes_have_names_and_defaults():
    remote = parse_config(REMOTE + "timeout_s = 5").remotes["far"]
    assert (remote.url, remote.models, remote.fetch_threads, remote.timeout_s) == (
        "http://h/p", (), 16, 5.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[remotes.far]\n", "remotes.far.url: is missing"),
        ('[remotes.":peers"]\nurl = "http://h/p"', "a name must not begin with ':'"),
        ('[remotes.far]\nurl = "ftp://h/p"', "remotes.far.url = 'ftp://h/p'"),
        (REMOTE + "colour = 1", "remotes.far.colour: unknown key"),
        (REMOTE + 'region = "x"', "remotes.far.region: means nothing for url = 'http://h/p'"),
        (
            '[remotes.far]\nurl = "http://user:p@h/p?sig=x"\nregion = "x"',
            "remotes.far.region: means nothing for url = 'http://h/p'",
        ),
        ('[remotes.b]\nurl = "s3://b"\nkey_file = "k"', "remotes.b.key_file: means nothing"),
        (
            REMOTE + 'models = ["a", "org/model", "bad name"]',
            "remotes.far.models: 'org/model' can be no model's name: letters, digits",
        ),
        ("remotes = 1", "remotes must be a table of tables, as in [remotes.NAME]"),
        ("[remotes]\nfar = 1", "remotes.far must be a table"),
    ],
)
def test_what_is_wrong_with_a_remote_is_told(text, problem):
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    assert problem in str(caught.value)
