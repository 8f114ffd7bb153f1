import io
import logging

import orjson
import pytest

from sllm_node.core import log as logs


@pytest.fixture
def root_logger():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_lines_carry_fields_and_the_ids_of_the_running_task(root_logger):
    out = io.StringIO()
    logs.configure("info", "json", out)
    token = logs.request_id.set("r-1")
    logging.getLogger("x").info("load finished", extra={"load_s": 0.5, "by_tier": {1: 2}})
    logs.request_id.reset(token)
    line = orjson.loads(out.getvalue())
    assert (line["event"], line["request"], line["load_s"]) == ("load finished", "r-1", 0.5)
    assert line["time"].endswith("+00:00")


def test_console_lines_are_key_value(root_logger):
    out = io.StringIO()
    logs.configure("info", "console", out)
    logging.getLogger("x").warning("evicted", extra={"model": "m"})
    assert out.getvalue().rstrip().endswith("WARNING evicted model=m")


@pytest.mark.parametrize("end", ["\n", "\r", "\x85", "\u2028", "\x1b[2K", "\x00"])
def test_a_value_never_ends_its_line_at_a_terminal(root_logger, end):
    out = io.StringIO()
    logs.configure("info", "console", out)
    logging.getLogger("x").info("request", extra={"user": f"ä{end}ERROR fake", "n": (end,)})
    line = out.getvalue()
    assert line.endswith("\n")
    assert end not in line[:-1]
    assert f"user=ä{repr(end)[1:-1]}ERROR fake" in line


@pytest.mark.parametrize("style", ["json", "console"])
def test_an_exception_is_logged_with_its_trace(root_logger, style):
    out = io.StringIO()
    logs.configure("info", style, out)
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("x").exception("failed")
    assert "ValueError: broken" in out.getvalue()
    assert ("\n" in out.getvalue().rstrip()) is (style == "console")


def test_the_level_is_obeyed(root_logger):
    out = io.StringIO()
    logs.configure("warning", "json", out)
    logging.getLogger("x").info("quiet")
    assert out.getvalue() == ""
