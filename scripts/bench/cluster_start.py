"""How soon after a request its model's load begins, on a quiet cluster of two nodes: one request at a time.

    python -m scripts.bench.cluster_start [--models 6] [--rounds 3] [--against TREE] [--json FILE]

Node `near` takes all requests; half of the models lie in its own store, half in that of `far`, and each
node's device holds one model. Each model is asked for after the node that takes it was started (its
tokenizer is `new`), and again once it was unloaded (`known`), with an empty device (`load`) or one on
which another model lies idle (`evict`). From the client's clock before it sends to the first read or copy
that the load issues (`begun`), by the nodes' logs; and to the client's first token. A lone node (`alone`)
is asked the same.

With `--against`, nodes of another source tree (a git worktree with the same `begun_s` in its logs) are asked
in turns with ours, and ratios are told: the machine's moods are then the same for both.
"""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import aiohttp
import orjson

from scripts.bench.cluster_load import Answer, Request, ask
from scripts.bench.cluster_logs import summary
from scripts.bench.figures import commit, describe_machine
from tests.e2e import cluster_nodes
from tests.e2e.forked import ROOT
from tests.e2e.process import NodeProcess
from tests.models import make_checkpoint

RESULT: Final = Path(__file__).parent / "results" / "cluster.json"
QUIET_S: Final = 0.3
"""Between requests, so that heartbeats have told what changed."""
FAMILIES: Final = ("llama", "qwen3", "mistral")

Figures = dict[str, list[tuple[float, float]]]
"""By way: (request to load begun, request to first token), milliseconds."""


class Rig:
    """The checkpoints, and the nodes of one source tree on them."""

    def __init__(self, place: Path, tree: Path, models: dict[str, list[str]], store: Path) -> None:
        place.mkdir()
        self.models = models
        file = cluster_nodes.make_cluster(place / "shared", tuple(models))
        # Where a model lies is where it is to be loaded, however slow a moment was.
        file.write_text(file.read_text() + "[limits]\npeer_bandwidth = 0\n")
        size = sum(path.stat().st_size for path in (store / models["near"][0]).iterdir())
        room = int(1.6 * (size + cluster_nodes.KV_BYTES))
        self.nodes = {}
        for name, held in models.items():
            own = place / f"store-{name}"
            own.mkdir()
            for model in held:
                (own / model).symlink_to(store / model)
            self.nodes[name] = cluster_nodes.made(
                place, name, own, file, memory_bytes=room, braked=False
            )
        (place / "alone").mkdir()
        self.alone = NodeProcess(
            place / "alone", place / "store-near", id="alone", memory_bytes=room,
            kv_cache_bytes=cluster_nodes.KV_BYTES,
        )  # fmt: skip
        for node in (self.alone, *self.nodes.values()):
            node.root = tree

    async def together(self, found: Figures, tag: str) -> None:
        """Ask the cluster for each model in each state."""
        with cluster_nodes.running(*self.nodes.values()):
            for node in self.nodes.values():
                await cluster_nodes.sees(node, *self.models)
            near = self.nodes["near"]
            for name, where in (("near", "here"), ("far", "peer")):
                await self._ask_all(near, self.nodes[name], self.models[name], where, found, tag)

    async def lonely(self, found: Figures, tag: str) -> None:
        """Ask a node that is in no cluster."""
        with self.alone as node:
            await self._ask_all(node, node, self.models["near"], "alone", found, tag)

    async def _ask_all(
        self, entry: NodeProcess, target: NodeProcess, models: list[str], where: str,
        found: Figures, tag: str,
    ) -> None:  # fmt: skip
        asked: dict[str, tuple[str, Answer]] = {}
        async with aiohttp.ClientSession() as http:
            for turn, (way, known) in enumerate(
                (("load", "new"), ("load", "known"), ("evict", "known"))
            ):
                for number, model in enumerate(models):
                    name = f"{tag}-{where}-{turn}-{number}"
                    request = Request(name, 0.0, model, "How long does it take?", 4)
                    answer = Answer()
                    await ask(http, entry.url, request, name, answer)
                    assert len(answer.tokens) == request.tokens, answer.error
                    asked[name] = (f"{way} {where}, tokenizer {known}", answer)
                    is_last = number == len(models) - 1
                    if way == "load" and not (turn == 1 and is_last):
                        await http.post(f"{target.url}/admin/models/{model}/unload", json={})
                    await asyncio.sleep(QUIET_S)
        _collect(target, asked, found)


def _collect(target: NodeProcess, asked: dict[str, tuple[str, Answer]], found: Figures) -> None:
    """Join what clients saw with what the target's log says of its loads."""
    ends: dict[str, list[float]] = defaultdict(list)
    for line in target.events("load finished"):
        ends[line["model"]].append(line["begun_s"])
    starts: dict[str, list[float]] = defaultdict(list)
    for line in target.events("load started"):
        starts[line["model"]].append(datetime.fromisoformat(line["time"]).timestamp())
    loads = sorted(one for model in starts for one in zip(starts[model], ends[model], strict=True))
    told = sorted(asked.values(), key=lambda one: one[1].sent_at)
    assert len(told) == len(loads), (len(told), len(loads))
    for (way, answer), (at, begun_s) in zip(told, loads, strict=True):
        begun_ms = 1e3 * (at + begun_s - answer.sent_at)
        found[way].append((begun_ms, 1e3 * (answer.first_s or 0.0)))


async def measured(rigs: dict[str, Rig], rounds: int) -> dict[str, Figures]:
    """Ask the nodes of each tree in turns."""
    found: dict[str, Figures] = {tree: defaultdict(list) for tree in rigs}
    for number in range(rounds):
        order = list(rigs.items()) if number % 2 == 0 else list(rigs.items())[::-1]
        for tree, rig in order:
            await rig.together(found[tree], f"s{number}")
            await rig.lonely(found[tree], f"a{number}")
    return found


def reported(found: dict[str, Figures]) -> dict[str, Any]:
    """Return the figures of each tree, and the ratios of ours to the other's."""
    told: dict[str, Any] = {
        tree: {
            way: {
                "begun_ms": summary([begun for begun, _ in pairs]),
                "first_token_ms": summary([first for _, first in pairs]),
            }
            for way, pairs in sorted(figures.items())
        }
        for tree, figures in found.items()
    }
    if "against" in found:
        told["ratio_of_medians"] = {
            way: {
                what: round(_median(pairs, i) / _median(found["against"][way], i), 3)
                for i, what in enumerate(("begun", "first_token"))
            }
            for way, pairs in sorted(found["ours"].items())
        }
    return told


def _median(pairs: list[tuple[float, float]], which: int) -> float:
    return statistics.median(pair[which] for pair in pairs)


def main() -> int:
    """Run, print and write what was seen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--json", type=Path, default=RESULT)
    arguments = parser.parse_args()
    about = {
        "machine": describe_machine(), "load_average_before": os.getloadavg(),
        "note": "the machine is shared with other programs", "rounds": arguments.rounds,
        "commit": commit(), "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "store").mkdir()
        names = [f"model-{number}" for number in range(arguments.models)]
        for number, model in enumerate(names):
            family = FAMILIES[number % len(FAMILIES)]
            make_checkpoint(place / "store", model, family=family, seed=number, chunk_bytes=65536)
        half = len(names) // 2
        models = {"near": names[:half], "far": names[half:]}
        trees = {"ours": ROOT} | ({"against": arguments.against} if arguments.against else {})
        rigs = {
            name: Rig(place / name, tree, models, place / "store") for name, tree in trees.items()
        }
        came = reported(asyncio.run(measured(rigs, arguments.rounds)))
    print(orjson.dumps(came, option=orjson.OPT_INDENT_2).decode())
    known = orjson.loads(arguments.json.read_bytes()) if arguments.json.exists() else {}
    known["start"] = {**came, "about": about}
    arguments.json.write_bytes(orjson.dumps(known, option=orjson.OPT_INDENT_2) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
