import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sllm_node.core.errors import (
    ArgumentError,
    ChecksumError,
    DeviceMemoryError,
    LoadFailedError,
    ModelBusyError,
    ModelNotFoundError,
)
from sllm_node.core.types import ModelId, Part, Tier
from sllm_node.core.units import KIB, MIB
from sllm_node.device.cpu import CpuDevice, CpuStream
from sllm_node.library.files import find
from sllm_node.library.loader import Loader
from tests.models import make_checkpoint

POOL = MIB
ROOT = Path(__file__).parents[3]


class SlowDevice(CpuDevice):
    """Its copies wait until they are told to go on."""

    def __init__(self, name):
        super().__init__(64 * MIB, name)
        self.started, self.go_on = threading.Event(), threading.Event()

    def stream(self):
        return SlowStream(self)


class SlowStream(CpuStream):
    def __init__(self, device):
        super().__init__()
        self._device = device

    def _copy(self, destination, offset, source):
        self._device.started.set()
        assert self._device.go_on.wait(60)
        super()._copy(destination, offset, source)


def load(loader, checkpoint, device="cpu", meanwhile=lambda: None, **options):
    placement = (Part(device, 0, checkpoint.index.size),)
    return loader.load(
        checkpoint, placement, meanwhile=meanwhile, **{"pool_bytes": POOL, **options}
    )


def bytes_of(checkpoint):
    return b"".join((checkpoint.path / s.name).read_bytes() for s in checkpoint.index.shards)


def delivered(loaded):
    return b"".join(bytes(h.tensor(h.part.start, h.part.end).numpy()) for h in loaded.parts)


def test_two_loads_of_one_folder_have_memory_of_their_own(loader, store):
    checkpoint = find(store / "llama")
    one, other = load(loader, checkpoint), load(loader, checkpoint)
    assert loader.memory_used("cpu") == 2 * checkpoint.index.size
    one.parts[0].tensor(0, 4096).zero_()
    assert delivered(other) == bytes_of(checkpoint)
    assert delivered(load(loader, checkpoint)) == bytes_of(checkpoint)


def test_threads_load_at_the_same_time(loader, store):
    names = ["llama", "gpt2", "gemma2", "llama", "gpt2", "llama"]
    found: list[bool] = []

    def work(name):
        checkpoint = find(store / name)
        for _ in range(3):
            found.append(delivered(load(loader, checkpoint)) == bytes_of(checkpoint))

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 18


def test_what_the_caller_does_meanwhile_comes_back(loader, store):
    assert load(loader, find(store / "llama"), meanwhile=lambda: 17).made == 17


def test_a_failure_meanwhile_cancels_the_load(loader, store):
    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        load(loader, find(store / "llama"), meanwhile=fail)
    assert loader.memory_used("cpu") == 0
    assert delivered(load(loader, find(store / "llama")))


def test_ctrl_c_cancels_the_load_and_its_memory_is_free_at_once(store):
    device = SlowDevice("cpu")

    def interrupt():
        assert device.started.wait(60)
        signal.pthread_kill(main, signal.SIGINT)
        device.go_on.set()

    main = threading.get_ident()
    loader = Loader(lambda name: device, lambda: ())
    thread = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # may be ignored
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            load(loader, find(store / "llama"))
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert loader.memory_used("cpu") == 0
    assert delivered(load(loader, find(store / "llama"))) == bytes_of(find(store / "llama"))
    loader.close()


def test_no_room_is_told_and_nothing_taken(store):
    checkpoint = find(store / "llama")
    small = Loader(lambda name: CpuDevice(checkpoint.index.size * 3 // 2, name), lambda: ())
    one = load(small, checkpoint)
    with pytest.raises(DeviceMemoryError) as caught:
        load(small, checkpoint)
    assert caught.value.device == "cpu"
    assert small.memory_used("cpu") == checkpoint.index.size
    del one
    assert delivered(load(small, checkpoint))  # what was let go of before is room
    small.close()


def test_a_damaged_byte_is_an_error_and_leaves_nothing(loader, tmp_path):
    made = make_checkpoint(tmp_path, "m")
    path = made.path / made.index.shards[0].name
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(ChecksumError, match=str(made.path)):
        load(loader, find(made.path))
    assert loader.memory_used("cpu") == 0
    path.write_bytes(whole)
    assert delivered(load(loader, find(made.path)))[: len(whole)] == whole


def test_a_checkpoint_that_was_replaced_is_read_anew(loader, tmp_path):
    load(loader, find(make_checkpoint(tmp_path, "m").path))
    other = make_checkpoint(tmp_path, "m", seed=1)
    assert delivered(load(loader, find(other.path))) == bytes_of(other)


def test_devices_are_opened_by_the_first_load_onto_them(loader, store):
    checkpoint = find(store / "llama")
    load(loader, checkpoint, "cpu:0")
    assert list(loader._devices) == ["cpu:0"]
    load(loader, checkpoint, "cpu:1")
    assert list(loader._devices) == ["cpu:0", "cpu:1"]


def test_progress_is_shown_while_a_load_runs(store):
    device, seen = SlowDevice("cpu"), []

    def watch(progress):
        seen.append((progress.bytes_done, progress.bytes_total))
        device.go_on.set()

    slow = Loader(lambda name: device, lambda: ())
    load(slow, find(store / "llama"), watch=watch)
    assert seen[0] == (0, find(store / "llama").index.size)
    slow.close()


def test_a_pool_of_another_size_is_refused_until_it_is_given_back(loader, store):
    load(loader, find(store / "llama"))
    with pytest.raises(ArgumentError, match="release_pool"):
        load(loader, find(store / "llama"), pool_bytes=2 * POOL)
    loader.close_pools()
    assert load(loader, find(store / "llama"), pool_bytes=2 * POOL)
    assert load(loader, find(store / "llama"), pool_bytes=None)


def test_a_pool_that_is_cut_otherwise_says_what_to_do(loader, store, tmp_path):
    load(loader, find(store / "llama"))
    other = make_checkpoint(tmp_path, "m", chunk_bytes=48 * KIB, codec="raw")
    with pytest.raises(ArgumentError, match="release_pool"):
        load(loader, find(other.path))


def test_a_pool_that_is_too_small_says_what_is_needed(loader, store):
    with pytest.raises(ArgumentError, match="32768 at least"):
        load(loader, find(store / "llama"), pool_bytes=16 * KIB)


def test_tensors_outlive_the_loader(store):
    checkpoint = find(store / "llama")
    loader = Loader(lambda name: CpuDevice(64 * MIB, name), lambda: ())
    loaded = load(loader, checkpoint)
    loader.close()
    loader.close()
    assert delivered(loaded) == bytes_of(checkpoint)


def test_an_unknown_checkpoint_is_an_error_of_ours(loader):
    with pytest.raises(ModelNotFoundError):
        loader._checkpoints.get(ModelId("x"))


def test_a_forked_child_loads_with_a_loader_of_its_own(store):
    code = f"""
import os, sys, warnings
warnings.simplefilter("ignore")
from sllm_node.torch import load_dict
first = load_dict({str(store / "llama")!r}, pool_bytes={POOL})
child = os.fork()
if not child:
    second = load_dict({str(store / "llama")!r}, pool_bytes={POOL})
    os._exit(0 if all(bool((first[n] == second[n]).all()) for n in first) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.stdout.strip(), done.stderr) == ("0", "")


def test_a_tensor_may_be_moved_and_written(loader, store):
    checkpoint = find(store / "llama")
    tensor = load(loader, checkpoint).parts[0].tensor(0, 16).view(torch.float32)
    tensor.fill_(2.5)
    assert tensor.to(torch.bfloat16).tolist() == [2.5] * 4


# --- giving the pool back beside loads ------------------------------------------------------------


def after_steps(loop, count, act):
    """Call `act` when every task of `loop` had `count` steps."""
    if count:
        loop.call_soon(after_steps, loop, count - 1, act)
    else:
        act()


def test_a_pool_given_back_fails_loads_under_way_and_those_in_line_get_a_new_one(store):
    device, checkpoint = SlowDevice("cpu"), find(store / "llama")
    loader, in_line = Loader(lambda name: device, lambda: ()), threading.Event()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(load, loader, checkpoint)
        assert device.started.wait(60)
        second = threads.submit(load, loader, checkpoint, meanwhile=in_line.set)
        assert in_line.wait(60)
        loop = loader._loop

        def go_on_behind_it():
            loop.call_soon_threadsafe(after_steps, loop, 5, device.go_on.set)

        loader._run(loader._close_stores(), go_on_behind_it)
        with pytest.raises(LoadFailedError, match=r"release_pool\(\) .* load it again"):
            first.result()
        assert delivered(second.result()) == bytes_of(checkpoint)
    loader.close()


def test_a_pool_may_be_given_back_in_the_moment_in_which_a_load_ends(loader, store):
    checkpoint, closing = find(store / "llama"), []
    load(loader, checkpoint)

    def ended(report):
        closing.append(loader._loop.create_task(loader._close_stores()))

    loader._stores["cpu"].store.on_load = ended
    with pytest.raises(LoadFailedError, match="release_pool"):
        load(loader, checkpoint)
    loader.close_pools()
    assert closing[0].exception() is None
    assert delivered(load(loader, checkpoint)) == bytes_of(checkpoint)


def test_a_pool_that_is_in_use_keeps_no_other_from_being_given_back(store):
    checkpoint = find(store / "llama")
    loader = Loader(lambda name: CpuDevice(64 * MIB, name), lambda: ())
    for device in ("cpu", "other"):
        load(loader, checkpoint, device)
    opened = [loader._stores[kind].store for kind in ("cpu", "other")]
    lease = loader._run(opened[0].acquire(checkpoint.model))
    with pytest.raises(ModelBusyError):
        loader.close_pools()
    assert loader._stores == {}
    assert [one._machinery for one in opened] == [None, None]
    lease.release()
    loader.close()


def test_what_the_pool_has_nothing_of_is_forgotten(loader, store):
    llama, gpt2 = find(store / "llama"), find(store / "gpt2")
    load(loader, llama)
    load(loader, gpt2)
    assert loader._checkpoints.known.keys() == {llama.model, gpt2.model}
    opened = loader._stores["cpu"].store
    opened.evict(llama.model, Tier.DRAM, "test")
    load(loader, gpt2)
    assert loader._checkpoints.known.keys() == {gpt2.model}
    assert opened._ledger.models() == (gpt2.model,)
    assert loader._turns == {}
    loader.close_pools()
    assert loader._checkpoints.known == {}
    assert delivered(load(loader, llama)) == bytes_of(llama)
