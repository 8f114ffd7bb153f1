"""Logs as events with fields: one line of JSON each, or key=value for a terminal.

`log.info("load finished", extra={"model": …, "load_s": …})`; request, session and model of the
running task are added from context variables.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Final, TextIO

import orjson
from typing_extensions import override

request_id: Final[ContextVar[str | None]] = ContextVar("request_id", default=None)
model_id: Final[ContextVar[str | None]] = ContextVar("model_id", default=None)

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


@contextmanager
def of_request(name: str) -> Iterator[None]:
    """Log what is done inside, and by tasks that begin inside, under this request."""
    token = request_id.set(name)
    try:
        yield
    finally:
        request_id.reset(token)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields: dict[str, object] = {}
    for name, variable in (("request", request_id), ("model", model_id)):
        if (value := variable.get()) is not None:
            fields[name] = value
    fields.update((k, v) for k, v in vars(record).items() if k not in _STANDARD)
    return fields


class JsonFormatter(logging.Formatter):
    """One line of JSON a record."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


def _shown(value: object) -> str:
    """Return a value as text that stays on its line and moves no cursor: clients choose some values."""
    text = str(value)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class ConsoleFormatter(logging.Formatter):
    """Time, level, event and key=value, for a person at a terminal."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).astimezone().strftime("%H:%M:%S.%f")[:-3]
        fields = " ".join(f"{name}={_shown(value)}" for name, value in _fields(record).items())
        line = f"{time} {record.levelname:<7} {record.getMessage()} {fields}".rstrip()
        if record.exc_info:
            line = f"{line}\n{self.formatException(record.exc_info)}"
        return line


def configure(level: str, style: str, stream: TextIO | None = None) -> None:
    """Send the process's logs to `stream` (stderr) at `level`, as `json` or `console`."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else ConsoleFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for chatty in ("aiohttp.access", "transformers", "httpx", "urllib3", "filelock"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
