"""The node's configuration: one frozen tree, parsed once, every problem reported together.

TOML comes in through `tomllib`; sizes may be written "16MiB". A key that is not declared here is an
error, so that a typing mistake is never a silently ignored wish. `configs/node.toml` lists every key
with its default and one line of meaning; a test holds the two together.
"""

import re
import tomllib
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from sllm_node.core.errors import ConfigError
from sllm_node.core.types import ResumeMode
from sllm_node.core.units import PAGE, parse_size
from sllm_node.core.urls import plain

Count = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0)]
Name = Annotated[str, Meta(min_length=1)]
_URLS = "an address as in https://host/path or s3://bucket/prefix"
_DEVICE_NAME = re.compile(r"cpu(:\d+)?|cuda(:\d+)?")


class ByteSize(int):
    """Bytes; written as a number or as text with a unit."""


def _size(text: str) -> Any:
    """Declare a default; a factory, because msgspec can't write a subclass of int into the schema."""
    return msgspec.field(default_factory=lambda: ByteSize(parse_size(text)))


CPU_MEMORY_BYTES = ByteSize(8 << 30)
"""Of a CPU as a device, whose device.memory_bytes is 0."""


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the file."""


class NodeConfig(Section, frozen=True):
    """Table [node]."""

    id: Name = "node-0"
    drain_s: Seconds = 30.0
    journal: str = ""


class StoreConfig(Section, frozen=True):
    """Table [store]."""

    path: Name = "/var/lib/sllm-node/models"
    pool_bytes: ByteSize = _size("4GiB")
    chunk_bytes: ByteSize = _size("16MiB")
    huge_pages: bool = True
    reader_threads: Count = 8
    max_concurrent_loads: Count = 2
    verify: Literal["first", "always", "never"] = "first"
    verify_on_device: bool = True
    direct_io: bool = True
    read_block_bytes: ByteSize = _size("0")
    piece_bytes: ByteSize = _size("256MiB")
    relay: bool = True
    relay_max_sessions: NotNegative = 0
    decode_staging_bytes: ByteSize = _size("512MiB")


class DeviceConfig(Section, frozen=True):
    """Table [device]."""

    names: Annotated[tuple[Name, ...], Meta(min_length=1)] = ("cpu",)
    memory_bytes: ByteSize = _size("0")
    reserve_bytes: ByteSize = _size("2GiB")


class EngineConfig(Section, frozen=True):
    """Table [engine]."""

    kv_cache_bytes: ByteSize = _size("512MiB")
    block_tokens: Count = 16
    prefix_cache: bool = True
    kv_offload: bool = False
    kv_offload_bytes: ByteSize = _size("1GiB")
    max_sessions: Count = 256
    max_step_tokens: Count = 2048
    prefill_beside_tokens: Count = 128
    prefill_beside_ratio: Annotated[float, Meta(ge=0)] = 2.0
    inter_token_target_s: Seconds = 0.05
    resume: ResumeMode = "fast"
    launch_ahead: Literal["auto", "always", "never"] = "auto"
    torch_threads: NotNegative = 0
    overlap_load: bool = True
    stall_after_s: Seconds = 120.0
    graphs_max: Count = 4096


class ScheduleConfig(Section, frozen=True):
    """Table [schedule]."""

    max_queue: Count = 1024
    max_wait_s: Seconds = 10.0
    queue_timeout_s: Seconds = 600.0
    keep_alive_s: float = 300.0


class ServerConfig(Section, frozen=True):
    """Table [server]."""

    host: Name = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    api_keys: tuple[Name, ...] = ()
    admin_keys: tuple[Name, ...] = ()
    allow_unauthenticated_remote: bool = False
    max_body_bytes: ByteSize = _size("8MiB")
    max_choices: Count = 16
    progress_interval_s: Annotated[float, Meta(gt=0)] = 2.0
    read_timeout_s: Annotated[float, Meta(gt=0)] = 60.0
    write_timeout_s: Annotated[float, Meta(gt=0)] = 60.0


class ClusterConfig(Section, frozen=True):
    """Table [cluster]."""

    file: str = ""
    listen: str = ""
    address: str = ""


class LogConfig(Section, frozen=True):
    """Table [log]."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "console"] = "json"


class ModelConfig(Section, frozen=True):
    """Table [models.NAME]."""

    preload: bool = False
    pinned: bool = False
    priority: int = 0
    keep_alive_s: float | None = None


class RemoteConfig(Section, frozen=True):
    """Table [remotes.NAME]."""

    url: Annotated[str, Meta(pattern="^(https?|s3)://[^/]+", description=_URLS)]
    models: tuple[Name, ...] = ()
    key_file: Name | None = None
    endpoint: Name | None = None
    region: Name | None = None
    credentials_file: Name | None = None
    anonymous: bool = False
    fetch_threads: Count = 16
    timeout_s: Annotated[float, Meta(gt=0)] = 10.0
    retries: NotNegative = 4


class Config(Section, frozen=True):
    """The whole file."""

    node: NodeConfig = msgspec.field(default_factory=NodeConfig)
    store: StoreConfig = msgspec.field(default_factory=StoreConfig)
    device: DeviceConfig = msgspec.field(default_factory=DeviceConfig)
    engine: EngineConfig = msgspec.field(default_factory=EngineConfig)
    schedule: ScheduleConfig = msgspec.field(default_factory=ScheduleConfig)
    server: ServerConfig = msgspec.field(default_factory=ServerConfig)
    cluster: ClusterConfig = msgspec.field(default_factory=ClusterConfig)
    log: LogConfig = msgspec.field(default_factory=LogConfig)
    models: dict[str, ModelConfig] = {}
    remotes: dict[str, RemoteConfig] = {}


def read_text(path: Path) -> str:
    """Return what the file at `path` says.

    Raises:
        ConfigError: it can't be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(str(path), (f"can't be read: {error.strerror}",)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), (f"is not UTF-8: {error}",)) from error


def parse_toml(text: str, origin: str) -> dict[str, Any]:
    """Return TOML `text` as a tree; `origin` names it in errors.

    Raises:
        ConfigError: it is no TOML.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(origin, (f"is no TOML: {error}",)) from error


def load_config(path: Path) -> Config:
    """Read and check the TOML file at `path`.

    Raises:
        ConfigError: with every problem found, each naming its key.
    """
    return parse_config(read_text(path), str(path))


def parse_config(text: str, origin: str = "config") -> Config:
    """Parse and check TOML `text`; `origin` names it in errors.

    Raises:
        ConfigError: with every problem found, each naming its key.
    """
    tree = parse_toml(text, origin)
    problems = list(find_problems(Config, tree, ""))
    # What is right of a file with mistakes is checked as well, so that all of them are told at once.
    config = msgspec.convert(sound_part(Config, tree), Config, dec_hook=decode_value)
    problems += _contradictions(config)
    if problems:
        raise ConfigError(origin, tuple(problems))
    return config


def config_schema() -> dict[str, Any]:
    """Return the JSON Schema of the file, for editors."""
    return msgspec.json.schema(Config, schema_hook=lambda _: {"type": ["string", "integer"]})


def decode_value(kind: type, value: object) -> object:
    """Return the `kind` that `value` of a file means; msgspec's hook."""
    if kind is ByteSize:
        if not isinstance(value, (int, str)):
            raise ValueError(f'{value!r} is no size; write "16MiB"')
        return ByteSize(parse_size(value))
    raise NotImplementedError(kind)


def find_problems(kind: type[msgspec.Struct], tree: object, at: str) -> Iterator[str]:
    """Yield what is wrong in `tree`, which stands at key `at`, field by field."""
    if not isinstance(tree, dict):
        yield f"{at or 'the file'} must be a table"
        return
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in tree.items():
        where = f"{at}.{key}" if at else key
        if key not in fields:
            yield f"{where}: unknown key{_suggest(key, fields)}"
        elif (named := _named(fields[key])) is not None:
            yield from _named_problems(named, key, value)
        elif isinstance(fields[key], type) and issubclass(fields[key], Section):
            yield from find_problems(fields[key], value, where)
        else:
            yield from _value_problems(fields[key], value, where)


def sound_part(kind: type[msgspec.Struct], tree: object) -> dict[str, Any]:
    """Return what of `tree` has no problem by itself."""
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    kept: dict[str, Any] = {}
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if (named := _named(fields.get(key))) is not None and isinstance(value, dict):
            kept[key] = _sound_tables(named, value)
        elif isinstance(fields.get(key), type) and issubclass(fields[key], Section):
            kept[key] = sound_part(fields[key], value)
        elif key in fields and not list(_value_problems(fields[key], value, key)):
            kept[key] = value
    return kept


def _sound_tables(kind: type[msgspec.Struct], tree: dict[str, Any]) -> dict[str, Any]:
    required = {field.name for field in msgspec.structs.fields(kind) if field.required}
    kept = {name: sound_part(kind, table) for name, table in tree.items()}
    return {name: table for name, table in kept.items() if required <= table.keys()}


def _named(declared: Any) -> type[msgspec.Struct] | None:
    """Return what each table of a table of tables is; None: the field is no such thing."""
    kind = (*get_args(declared), None, None)[1] if get_origin(declared) is dict else None
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _named_problems(kind: type[msgspec.Struct], key: str, tree: object) -> Iterator[str]:
    if not isinstance(tree, dict):
        yield f"{key} must be a table of tables, as in [{key}.NAME]"
        return
    for name, value in tree.items():
        yield from find_problems(kind, value, f"{key}.{name}")
        for field in msgspec.structs.fields(kind):
            if field.required and isinstance(value, dict) and field.name not in value:
                yield f"{key}.{name}.{field.name}: is missing"


def _value_problems(kind: Any, value: object, where: str) -> Iterator[str]:
    try:
        msgspec.convert(value, kind, dec_hook=decode_value)
    except (msgspec.ValidationError, ValueError) as error:
        yield f"{where} = {value!r}: {_allowed(kind) or error}"


def _allowed(kind: Any) -> str | None:
    """Return what a field may be, where that is a list of words or letters."""
    if get_origin(kind) is Literal:
        return f"must be {' or '.join(repr(word) for word in get_args(kind))}"
    if get_origin(kind) is not Annotated:
        return None
    metas = (one for one in get_args(kind)[1:] if isinstance(one, Meta))
    said = next((one.description for one in metas if one.description), None)
    return said and f"must be {said}"


def _suggest(key: str, fields: dict[str, Any]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(key, fields, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(fields)}"


def _contradictions(config: Config) -> Iterator[str]:
    checks: tuple[Callable[[Config], str | None], ...] = (
        _check_chunks, _check_blocks, _check_pool, _check_offload, _check_bind, _check_keep_alive, _check_beside, _check_device, _check_remotes, _check_cluster,
    )  # fmt: skip
    for check in checks:
        if (problem := check(config)) is not None:
            yield problem


def _check_chunks(config: Config) -> str | None:
    chunk = config.store.chunk_bytes
    if chunk < PAGE or chunk % PAGE:
        return f"store.chunk_bytes = {chunk}: must be a multiple of {PAGE} bytes, for direct I/O"
    return None


def _check_blocks(config: Config) -> str | None:
    block = config.store.read_block_bytes
    if block % PAGE:
        return f"store.read_block_bytes = {block}: must be a multiple of {PAGE} bytes, or 0"
    return None


def _check_pool(config: Config) -> str | None:
    smallest = 2 * config.store.chunk_bytes
    if config.store.pool_bytes < smallest:
        return (
            f"store.pool_bytes = {config.store.pool_bytes}: must hold two chunks at least "
            f"({smallest} bytes), so that one is read while the other is copied"
        )
    return None


def _check_offload(config: Config) -> str | None:
    chunk, pool = config.store.chunk_bytes, config.store.pool_bytes
    size = config.engine.kv_offload_bytes
    if config.engine.kv_offload and not chunk <= size <= pool - 2 * chunk:
        return (
            f"engine.kv_offload_bytes = {size}: must be one chunk of the pool at least ({chunk} bytes) and "
            f"leave two of store.pool_bytes = {pool} to loads, while engine.kv_offload is on"
        )
    return None


def _check_bind(config: Config) -> str | None:
    server = config.server
    if is_loopback(server.host) or server.api_keys or server.allow_unauthenticated_remote:
        return None
    return (
        f"server.host = {server.host!r} is reachable from other machines: set server.api_keys, "
        "or server.allow_unauthenticated_remote = true if that is what you want"
    )


def _check_keep_alive(config: Config) -> str | None:
    values = {"schedule.keep_alive_s": config.schedule.keep_alive_s}
    for name, model in config.models.items():
        if model.keep_alive_s is not None:
            values[f"models.{name}.keep_alive_s"] = model.keep_alive_s
    for key, value in values.items():
        if value < 0 and value != -1:
            return f"{key} = {value}: must be seconds, or -1 for ever"
    return None


def _check_beside(config: Config) -> str | None:
    ratio = config.engine.prefill_beside_ratio
    if 0 < ratio <= 1:
        return (
            f"engine.prefill_beside_ratio = {ratio}: a step with prompts takes longer than one "
            "without; write more than 1, or 0 for no such limit"
        )
    return None


def _check_device(config: Config) -> str | None:
    device = config.device
    for name in device.names:
        if not _DEVICE_NAME.fullmatch(name):
            return f'device.names: {name!r} is no device; write "cpu", "cuda:0" or "cuda" for all'
    if len({name.partition(":")[0] for name in device.names}) > 1:
        return "device.names mixes kinds of devices; a node serves on CPUs or on GPUs"
    if len(set(device.names)) < len(device.names) or ("cuda" in device.names[1:]):
        return f"device.names = {list(device.names)}: names a device twice"
    size = device.memory_bytes
    if not size and device.names[0].startswith("cpu"):
        size = CPU_MEMORY_BYTES
    if 0 < size <= config.engine.kv_cache_bytes:
        return (
            f"engine.kv_cache_bytes = {config.engine.kv_cache_bytes}: leaves no room for weights "
            f"in device.memory_bytes = {size}"
        )
    return None


def _check_remotes(config: Config) -> str | None:
    for name, remote in config.remotes.items():
        if name.startswith(":"):
            return f"remotes.{name!r}: a name must not begin with ':'"
        only_s3 = {
            "endpoint": remote.endpoint, "region": remote.region,
            "credentials_file": remote.credentials_file, "anonymous": remote.anonymous or None,
        }  # fmt: skip
        wrong = [key for key, value in only_s3.items() if value is not None]
        if remote.url.startswith("s3:"):
            wrong = ["key_file"] if remote.key_file is not None else []
        if wrong:
            return f"remotes.{name}.{wrong[0]}: means nothing for url = {plain(remote.url)!r}"
    return None


def _check_cluster(config: Config) -> str | None:
    for key in ("listen", "address"):
        value = getattr(config.cluster, key)
        if value and not config.cluster.file:
            return f"cluster.{key} = {value!r}: means nothing without cluster.file"
        if value and not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}", value):
            return f'cluster.{key} = {value!r}: must be host:port, as in "0.0.0.0:8100"'
    return None


def is_loopback(host: str) -> bool:
    """Tell whether `host` names this machine only."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
