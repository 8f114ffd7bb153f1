import io
import json
import os
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sllm_node import __version__
from sllm_node.cli.main import app, main, serve_or_tell
from sllm_node.core.config import load_config
from sllm_node.core.errors import StoreFolderError


def run(*arguments):
    return CliRunner().invoke(app, arguments)


def test_the_version_is_told():
    assert run("--version").stdout == f"{__version__}\n"


def test_a_good_config_has_no_problems(tmp_path):
    file = tmp_path / "node.toml"
    file.write_text("")
    assert run("check-config", str(file), "--file-only").stdout == f"{file}: no problems\n"
    assert (
        json.loads(run("check-config", str(file), "--file-only", "--json").stdout)["problems"] == []
    )


def test_a_start_that_fails_tells_all_that_a_preflight_finds(tmp_path, capsys):
    file = tmp_path / "node.toml"
    file.write_text(f'[server]\nport = 0\n[store]\npath = "{file}/models"\n')

    def fail(_):
        raise StoreFolderError(f"{file}/models", "is none")

    with pytest.raises(StoreFolderError):
        serve_or_tell(load_config(file), file, fail)
    told = capsys.readouterr()
    assert "error    store.path: " in told.err
    assert "error    node.journal: " in told.err
    assert "ok  " not in told.err + told.out


def test_a_start_that_goes_well_looks_at_nothing_else(tmp_path, capsys):
    file = tmp_path / "node.toml"
    file.write_text(f'[server]\nport = 0\n[store]\npath = "{file}/models"\n')
    started = []
    serve_or_tell(load_config(file), Path("gone.toml"), started.append)
    assert (len(started), capsys.readouterr().err) == (1, "")


def test_a_preflight_has_one_line_for_each_finding_and_fails_with_an_error(tmp_path):
    file = tmp_path / "node.toml"
    text = f'[server]\nport = 0\n[store]\npath = "{tmp_path}/models"\npool_bytes = '
    file.write_text(f'{text}"64MiB"\n')
    done = run("check-config", str(file))
    assert (done.exit_code, f"{file}: no problems" in done.stdout) == (0, True)
    assert "ok       server.port: " in done.stdout
    file.write_text(f'{text}"4000TiB"\n')
    done = run("check-config", str(file))
    assert (done.exit_code, "error    store.pool_bytes: " in done.stdout) == (1, True)
    told = json.loads(run("check-config", str(file), "--json").stdout)
    (found,) = [one for one in told["findings"] if one["level"] == "error"]
    assert (found["about"], len(told["problems"])) == ("store.pool_bytes", 1)


def test_all_problems_of_a_config_are_told_at_once(tmp_path, monkeypatch, capsys):
    file = tmp_path / "node.toml"
    file.write_text("[node]\nx = 1\n[store]\ny = 2\n")
    monkeypatch.setattr(sys, "argv", ["sllm-node", "check-config", str(file)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    told = capsys.readouterr().err
    assert "2 problems" in told
    assert "node.x" in told
    assert "store.y" in told
    as_json = run("check-config", str(file), "--json")
    assert (as_json.exit_code, len(json.loads(as_json.stdout)["problems"])) == (1, 2)


def test_the_schema_is_json():
    assert "$defs" in json.loads(run("check-config", "--schema").stdout)


def test_a_file_must_be_named():
    assert run("check-config").exit_code == 1


def ended(monkeypatch, capsys, *arguments):
    """Return how the program ends, and what it says on stderr."""
    monkeypatch.setattr(sys, "argv", ["sllm-node", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code, capsys.readouterr().err


@contextmanager
def writing(monkeypatch, raw, *, is_buffered=True):
    """Let stdout write to `raw`."""
    stream = io.TextIOWrapper(
        io.BufferedWriter(raw) if is_buffered else raw, write_through=not is_buffered
    )
    monkeypatch.setattr(sys, "stdout", stream)
    yield
    with suppress(OSError):
        stream.close()


@pytest.mark.parametrize("is_buffered", [True, False])
@pytest.mark.parametrize("asked", [("--version",), ("check-config", "--schema"), ("ls", "--store")])
def test_output_that_cannot_be_written_is_one_sentence(
    monkeypatch, capsys, tmp_path, asked, is_buffered
):
    folder = (str(tmp_path),) if asked[-1] == "--store" else ()
    told = "sllm-node: the output can't be written: No space left on device\n"
    with writing(monkeypatch, io.FileIO("/dev/full", "w"), is_buffered=is_buffered):
        assert ended(monkeypatch, capsys, *asked, *folder) == (1, told)


def test_a_reader_that_has_enough_is_told_nothing(monkeypatch, capsys):
    reading, written = os.pipe()
    os.close(reading)
    with writing(monkeypatch, io.FileIO(written, "w")):
        assert ended(monkeypatch, capsys, "check-config", "--schema") == (1, "")


def test_a_file_whose_name_is_no_text_is_checked_and_shown_escaped(tmp_path, monkeypatch, capsys):
    file = tmp_path / "\udcff.toml"
    file.write_text("")
    monkeypatch.setattr(sys, "argv", ["sllm-node", "check-config", "--file-only", str(file)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code in (0, None)
    assert capsys.readouterr().out == f"{tmp_path}/\\udcff.toml: no problems\n"
    told = json.loads(run("check-config", "--file-only", "--json", str(file)).stdout)
    assert told["file"] == str(file)
