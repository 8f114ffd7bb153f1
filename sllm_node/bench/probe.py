"""Tries a peer in a process of its own, so that one that crashes or hangs does not end a run.

`python -m sllm_node.bench.probe NAME STORE DEVICE` loads the tiny shape and compares its bytes.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import sllm_node
from sllm_node.bench.contestants import find_peer
from sllm_node.bench.files import prepare_shape
from sllm_node.bench.reference import read_reference
from sllm_node.bench.shapes import find_shape

TIMEOUT_S: Final = 90.0


def probe(name: str, store: Path, device: str) -> str | None:
    """Return why the peer `name` can't take part; None: it can. Blocks for some seconds."""
    command = [sys.executable, "-m", "sllm_node.bench.probe", name, str(store), device]
    root = str(Path(sllm_node.__file__).parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(  # noqa: S603 - our own module
            command, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return f"did not end within {TIMEOUT_S:.0f} s on the tiny shape"
    if done.returncode == 0:
        return None
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return f"failed on the tiny shape (status {done.returncode}): {last}"[:300]


def main() -> None:
    """Load the tiny shape with a peer; exit status 0 if every byte is right."""
    name, store, device = sys.argv[1:]
    files = prepare_shape(find_shape("tiny"), Path(store), 1, seed=0, device="cpu")[0]
    peer = find_peer(name)
    loaded = peer.load(files, device, warm=False)
    found = read_reference(files, device).compare(loaded.tensors)
    if found.different or (found.missing and not peer.in_module_layout):
        sys.exit(f"{len(found.different)} tensors differ, {len(found.missing)} are missing")


if __name__ == "__main__":
    main()
