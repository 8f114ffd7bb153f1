"""The node's configuration: one frozen tree, parsed once, every problem reported together.

TOML comes in through `tomllib`; sizes may be written "16MiB". A key that is not declared here is an
error, so that a typing mistake is never a silently ignored wish. `configs/node.toml` lists every key
with its default and one line of meaning; a test holds the two together.
"""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from sllm_node.core.contradictions import LONGEST_S, contradictions
from sllm_node.core.errors import ConfigError
from sllm_node.core.types import ResumeMode
from sllm_node.core.units import parse_size

MOST: Final = 1_000_000
"""What a key may count; more is a slip of the finger, and what is made of it fails late, or not at all."""
THREADS_MOST: Final = 1024
Count = Annotated[int, Meta(ge=1, le=MOST)]
NotNegative = Annotated[int, Meta(ge=0, le=MOST)]
Threads = Annotated[int, Meta(ge=1, le=THREADS_MOST)]
Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Seconds = Annotated[float, Meta(ge=0, le=LONGEST_S)]
SomeSeconds = Annotated[float, Meta(gt=0, le=LONGEST_S)]
Name = Annotated[str, Meta(min_length=1)]
_SHOWN_MAX = 80
_URLS = "an address as in https://host/path or s3://bucket/prefix"


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
    reader_threads: Threads = 8
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

    @property
    def cpu_bytes(self) -> ByteSize:
        """Memory of each device, if these are CPUs."""
        return self.memory_bytes or CPU_MEMORY_BYTES


class EngineConfig(Section, frozen=True):
    """Table [engine]."""

    kv_cache_bytes: ByteSize = _size("512MiB")
    block_tokens: Count = 16
    prefix_cache: bool = True
    kv_offload: bool = False
    kv_offload_bytes: ByteSize = _size("1GiB")
    max_sessions: Count = 256
    max_step_tokens: Annotated[int, Meta(ge=1, le=65535)] = 2048  # of a launch of our kernels
    prefill_beside_tokens: Count = 128
    prefill_beside_ratio: Annotated[float, Meta(ge=0, le=1e6)] = 2.0
    inter_token_target_s: Seconds = 0.05
    resume: ResumeMode = "fast"
    launch_ahead: Literal["auto", "always", "never"] = "auto"
    torch_threads: Annotated[int, Meta(ge=0, le=THREADS_MOST)] = 0
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
    progress_interval_s: SomeSeconds = 2.0
    read_timeout_s: SomeSeconds = 60.0
    write_timeout_s: SomeSeconds = 60.0


class ClusterConfig(Section, frozen=True):
    """Table [cluster]."""

    file: str = ""
    listen: str = ""
    address: str = ""
    texts_bytes: ByteSize = _size("4GiB")
    """On disk: tokenizers of models that only peers have; those used longest ago go."""


class LogConfig(Section, frozen=True):
    """Table [log]."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "console"] = "json"


class ModelConfig(Section, frozen=True):
    """Table [models.NAME]."""

    preload: bool = False
    pinned: bool = False
    priority: Priority = 0
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
    fetch_threads: Threads = 16
    timeout_s: SomeSeconds = 10.0
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
        return tomllib.loads(text.removeprefix("\ufeff"))  # of editors that mark UTF-8
    except ValueError as error:  # TOMLDecodeError, or a number of thousands of digits
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
    problems += contradictions(config)
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
    if isinstance(value, str) and "\0" in value:
        yield f"{where} = {_shown(value)}: has a NUL character, which no path can have; remove it"
        return
    try:
        msgspec.convert(value, kind, dec_hook=decode_value)
    except (msgspec.ValidationError, ValueError) as error:
        yield f"{where} = {_shown(value)}: {_allowed(kind) or error}"


def _shown(value: object) -> str:
    """Return what the file says, of something long the beginning."""
    text = repr(value)
    return text if len(text) <= _SHOWN_MAX else f"{text[:_SHOWN_MAX]}..."


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
