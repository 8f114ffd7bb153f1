import asyncio
import functools
import random
import threading
from dataclasses import replace

import pytest
import torch

from sllm_node.core.clock import ManualClock
from sllm_node.core.config import ByteSize, EngineConfig
from sllm_node.core.errors import (
    CancelledByOperatorError,
    CheckpointFormatError,
    DeviceMemoryError,
    EngineError,
    InvalidRequestError,
    KvMemoryError,
    PromptTooLongError,
    UnsupportedArchitectureError,
)
from sllm_node.core.types import SamplingParameters
from sllm_node.device.cpu import CpuDevice
from sllm_node.engine.kept import build
from sllm_node.engine.skeleton import build_skeleton, forward_order
from sllm_node.engine.steps import Gate, StepThread
from sllm_node.engine.weights import bind, unbind
from tests.models import make_checkpoint, make_source
from tests.unit.engine.rig import GREEDY, DeviceMemory, Weights, ask, collect, engine_of, engines_of

PROMPT = (20, 31, 45, 60, 72)
SAMPLED = SamplingParameters(
    temperature=0.9, top_p=0.95, top_k=50, repetition_penalty=1.2, presence_penalty=0.5,
    frequency_penalty=0.3, seed=11,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("store"), "m")


# --- generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
async def test_a_session_resumed_from_its_tokens_goes_on_identically(checkpoint, sampling):
    async with engine_of(checkpoint) as engine:
        text, tokens, logprobs, finish = await collect(
            engine.submit(ask(PROMPT, 20, sampling, logprobs=2))
        )
        shown = ""
        generation = engine.submit(ask(PROMPT, 20, sampling))
        per_token = []
        async for chunk in generation:
            per_token.append((len(chunk.tokens), chunk.text))
        assert "".join(t for _, t in per_token) == text
        for cut in random.Random(1).sample(range(1, 20), 6):
            resumed = ask(PROMPT, 20, sampling, resumed=tokens[:cut], logprobs=2)
            rest, more, logs, end = await collect(engine.submit(resumed))
            assert tokens[:cut] + more == tokens
            assert text.endswith(rest)
            assert end == finish
            assert [entry.token for entry in logs] == [e.token for e in logprobs[cut:]]
            assert [entry.offset for entry in logs] == [e.offset for e in logprobs[cut:]]
        assert shown == ""


async def test_log_probabilities_say_where_their_text_begins(checkpoint):
    async with engine_of(checkpoint) as engine:
        request = ask(PROMPT, 60, SAMPLED, logprobs=0)
        text, _, logprobs, _ = await collect(engine.submit(request))
    offsets = [entry.offset for entry in logprobs]
    assert offsets == sorted(offsets)
    assert offsets[0] == 0
    # Parts of a character begin where it begins; special tokens do not show.
    plain = [not entry.text.startswith(("bytes:", "<|")) for entry in logprobs]
    found = [entry for i, entry in enumerate(logprobs) if plain[i] and (i == 0 or plain[i - 1])]
    assert found
    assert all(text.startswith(entry.text, entry.offset) for entry in found)


async def test_what_is_sampled_does_not_depend_on_the_company(checkpoint):
    async with engine_of(checkpoint, max_step_tokens=8, block_tokens=4) as engine:
        alone = (await collect(engine.submit(ask(PROMPT, 16, SAMPLED))))[1]
        numbers = random.Random(5)
        crowd = [
            ask([numbers.randrange(4, 300) for _ in range(numbers.randrange(1, 30))], 16)
            for _ in range(12)
        ]
        crowd.insert(5, ask(PROMPT, 16, SAMPLED))
        generations = [engine.submit(request) for request in crowd]
        results = await asyncio.gather(*(collect(g) for g in generations))
        assert results[5][1] == alone


async def test_a_stop_string_ends_the_text_before_it(checkpoint):
    async with engine_of(checkpoint) as engine:
        text, tokens, *_ = await collect(engine.submit(ask(PROMPT, 24, SAMPLED)))
        middle = len(text) // 2
        stop = text[middle : middle + 3]
        generation = engine.submit(ask(PROMPT, 24, SAMPLED, stop=(stop,)))
        chunks = [chunk async for chunk in generation]
        assert "".join(chunk.text for chunk in chunks) == text[: text.index(stop)]
        assert (chunks[-1].finish, chunks[-1].stop_text) == ("stop", stop)
        assert len(generation.tokens) <= len(tokens)


async def test_an_end_token_ends_the_text_unless_it_is_ignored(checkpoint):
    async with engine_of(checkpoint) as engine:
        eos = next(iter(engine._parts.codec.eos_ids))
        force = SamplingParameters(temperature=0.0, logit_bias=((eos, 100.0),))
        text, tokens, _, finish = await collect(
            engine.submit(ask(PROMPT, 5, force, ignore_eos=False))
        )
        assert (text, tokens, finish) == ("", (eos,), "stop")
        _, tokens, _, finish = await collect(engine.submit(ask(PROMPT, 5, force)))
        assert (tokens, finish) == ((eos,) * 5, "length")


async def test_a_special_token_that_is_a_stop_string_ends_the_text_at_both_ends_of_a_move(
    checkpoint,
):
    async with engine_of(checkpoint) as engine:
        eos = next(iter(engine._parts.codec.eos_ids))
        force = SamplingParameters(temperature=0.0, logit_bias=((eos, 100.0),))
        stopped = ask(PROMPT, 5, force, stop=("<|im_end|>",))
        (chunk,) = [chunk async for chunk in engine.submit(stopped)]
        assert (chunk.text, chunk.tokens, chunk.finish) == ("", (eos,), "stop")
        assert chunk.stop_text == "<|im_end|>"
        assert await collect(engine.submit(replace(stopped, resumed=(eos,)))) == (
            "",
            (),
            (),
            "stop",
        )


async def test_a_session_ends_at_the_models_context(tmp_path):
    small = make_checkpoint(tmp_path, "m", max_position_embeddings=16)
    async with engine_of(small) as engine:
        _, tokens, _, finish = await collect(engine.submit(ask(PROMPT, 11)))
        assert (len(tokens), finish) == (11, "length")
        with pytest.raises(PromptTooLongError, match="the model's context allows 16"):
            engine.submit(ask(PROMPT, 12))


async def test_a_reader_that_lags_gets_its_tokens_joined(checkpoint):
    async with engine_of(checkpoint) as engine:
        slow = engine.submit(ask(PROMPT, 16))
        quick = engine.submit(ask(PROMPT, 16))
        _, expected, _, _ = await collect(quick)
        while not slow.is_ended:
            await asyncio.sleep(0)
        chunks = [chunk async for chunk in slow]
        assert len(chunks) == 1
        assert chunks[0].tokens == expected == slow.tokens


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (ask((), 4), InvalidRequestError),
        (ask((5, 10_000), 4), InvalidRequestError),
        (ask((5, -1), 4), InvalidRequestError),
        (ask(PROMPT, 4, resumed=(1, 2, 3, 4)), InvalidRequestError),
        (ask(PROMPT, 508), PromptTooLongError),
        (ask(PROMPT, 4, SamplingParameters(logit_bias=((320, 1.0),))), InvalidRequestError),
        (ask(PROMPT, 4, SamplingParameters(logit_bias=((-1, 1.0),))), InvalidRequestError),
        (ask(PROMPT, 4, SamplingParameters(logit_bias=((5, float("nan")),))), InvalidRequestError),
        (ask(PROMPT, 4, SamplingParameters(seed=1 << 64)), InvalidRequestError),
        (ask(PROMPT, 4, SamplingParameters(seed=-1)), InvalidRequestError),
        (ask(PROMPT, 4, SamplingParameters(temperature=float("nan"))), InvalidRequestError),
        (ask(PROMPT, 4, SamplingParameters(top_k=-1)), InvalidRequestError),
        (ask(PROMPT, 4, SamplingParameters(top_p=1.5)), InvalidRequestError),
        (ask(PROMPT, 4, SamplingParameters(min_p=-0.1)), InvalidRequestError),
        (ask(PROMPT, 4, SamplingParameters(repetition_penalty=0.0)), InvalidRequestError),
        (ask(PROMPT, 4, SamplingParameters(presence_penalty=float("inf"))), InvalidRequestError),
        (ask(PROMPT, 4, logprobs=-1), InvalidRequestError),
        (ask(PROMPT, 4, stop=("",)), InvalidRequestError),
    ],
)
async def test_a_wrong_request_is_refused_and_disturbs_nobody(checkpoint, request_, error):
    async with engine_of(checkpoint) as engine:
        running = engine.submit(ask(PROMPT, 12))
        with pytest.raises(error):
            engine.submit(request_)
        assert len((await collect(running))[1]) == 12


async def test_what_can_never_fit_the_kv_memory_is_refused(checkpoint):
    async with engine_of(checkpoint, kv_cache_bytes=ByteSize(40 << 10)) as engine:
        limit = engine._parts.blocks.capacity_tokens
        assert limit < 512
        with pytest.raises(PromptTooLongError, match="kv_cache_bytes"):
            engine.submit(ask(PROMPT, limit))


async def test_a_cancelled_session_gives_its_blocks_back_and_the_others_go_on(checkpoint):
    async with engine_of(checkpoint) as engine:
        doomed, other = engine.submit(ask(PROMPT, 400)), engine.submit(ask(PROMPT, 12))
        await anext(doomed)
        doomed.cancel()
        doomed.cancel()
        with pytest.raises(StopAsyncIteration):
            await anext(doomed)
        assert len((await collect(other))[1]) == 12
        assert (engine.running, engine.waiting) == (0, 0)


# --- failures -------------------------------------------------------------------------------------


async def test_a_step_that_fails_ends_its_sessions_and_the_engine_goes_on(checkpoint):
    async with engine_of(checkpoint) as engine:
        advance = engine._runner.advance
        engine._runner.advance = lambda steps: 1 / 0
        failing = engine.submit(ask(PROMPT, 8))
        with pytest.raises(EngineError, match="ZeroDivisionError"):
            await collect(failing)
        engine._runner.advance = advance
        assert len((await collect(engine.submit(ask(PROMPT, 8))))[1]) == 8


@pytest.mark.parametrize("fails", [False, True])
async def test_the_module_of_a_replica_that_failed_is_built_anew(checkpoint, fails):
    with CpuDevice(1 << 30) as device:
        engines = engines_of(device, EngineConfig(kv_cache_bytes=ByteSize(8 << 20)))
        weights, codec = Weights(checkpoint, device), await engines.load_codec(checkpoint.path)
        skeleton = await engines.skeleton(checkpoint)
        engine = await engines.open(weights, skeleton, codec)
        if fails:
            engine._runner.advance = lambda steps: 1 / 0
            with pytest.raises(EngineError):
                await collect(engine.submit(ask(PROMPT, 8)))
        await engine.close()
        assert (await engines.skeleton(checkpoint) is skeleton) is not fails
        weights.buffer.close()
        engines.close()


class FullMemory(DeviceMemory):
    async def allocate(self, device, size, again=None):
        raise DeviceMemoryError(device, size, 0, size)


async def test_a_module_is_kept_when_there_is_no_room_for_its_kv_memory(checkpoint):
    with CpuDevice(1 << 30) as device:
        engines = engines_of(device, EngineConfig(kv_cache_bytes=ByteSize(8 << 20)))
        engines._memory = FullMemory(device)
        weights, codec = Weights(checkpoint, device), await engines.load_codec(checkpoint.path)
        skeleton = await engines.skeleton(checkpoint)
        with pytest.raises(DeviceMemoryError):
            await engines.open(weights, skeleton, codec)
        assert await engines.skeleton(checkpoint) is skeleton
        weights.buffer.close()
        engines.close()


async def test_a_module_that_is_given_back_is_kept_until_its_checkpoint_is_forgotten(checkpoint):
    with CpuDevice(1 << 30) as device:
        engines = engines_of(device, EngineConfig(kv_cache_bytes=ByteSize(8 << 20)))
        skeleton = await engines.skeleton(checkpoint)
        engines.give_back(checkpoint, skeleton)
        assert await engines.skeleton(checkpoint) is skeleton
        engines.give_back(checkpoint, skeleton)
        engines.forget(checkpoint.model)
        assert await engines.skeleton(checkpoint) is not skeleton
        engines.close()


async def test_a_module_that_another_replaces_gives_its_addresses_up(checkpoint):
    with CpuDevice(1 << 30) as device:
        engines = engines_of(device, EngineConfig(kv_cache_bytes=ByteSize(8 << 20)))
        weights, codec = Weights(checkpoint, device), await engines.load_codec(checkpoint.path)
        old = await engines.skeleton(checkpoint)
        await (await engines.open(weights, old, codec)).close()
        closed, place = [], old.kv
        for one in place.memory:
            one.buffer.close = functools.partial(closed.append, one)
        engines.give_back(checkpoint, old)  # once more
        assert old.kv is place
        engines.give_back(checkpoint, await engines._builder.run_alone(build, checkpoint.path))
        assert old.kv is None
        assert closed == list(place.memory)
        weights.buffer.close()
        engines.close()


async def test_logits_that_are_no_numbers_fail_one_session_only(checkpoint):
    async with engine_of(checkpoint) as engine:
        poison = SamplingParameters(temperature=1.0, seed=99)
        advance = engine._runner.advance

        def spoil(steps):
            from sllm_node.engine.sampling import Drawn

            oldest = engine._flight[0]
            return [
                Drawn(-1) if drawn and part.session.request.sampling.seed == 99 else drawn
                for part, drawn in zip(oldest, advance(steps), strict=True)
            ]

        engine._runner.advance = spoil
        bad, good = engine.submit(ask(PROMPT, 8, poison)), engine.submit(ask(PROMPT, 8))
        failed, (_, tokens, _, _) = await asyncio.gather(
            asyncio.gather(collect(bad), return_exceptions=True), collect(good)
        )
        assert isinstance(failed[0], EngineError)
        assert len(tokens) == 8


@pytest.mark.parametrize("launch_ahead", ["never", "always"])
async def test_values_that_are_no_numbers_stay_in_their_own_session(checkpoint, launch_ahead):
    async with engine_of(checkpoint, launch_ahead=launch_ahead) as engine:
        prompts = [range(5, 5 + length) for length in (3, 9, 20)]
        clean = [await collect(engine.submit(ask(prompt))) for prompt in prompts]
        used = {token for _, tokens, *_ in clean for token in tokens}.union(*prompts)
        spoilt = next(token for token in range(320) if token not in used)
        embeddings = engine._parts.model.get_input_embeddings().weight
        embeddings.data[spoilt] = float("nan")
        del embeddings  # a view of the weights, which must be gone when they are
        poisoned = engine.submit(ask((spoilt,)))  # the first blocks are its own
        others = [engine.submit(ask(prompt)) for prompt in prompts]
        failed, *got = await asyncio.gather(
            collect(poisoned), *(collect(other) for other in others), return_exceptions=True
        )
        assert isinstance(failed, EngineError)
        assert got == clean


async def test_a_mistake_in_the_engine_itself_ends_all_sessions_and_refuses_new_ones(checkpoint):
    async with engine_of(checkpoint) as engine:
        engine._batch.stepped = lambda parts, took_s: 1 / 0
        waiting = engine.submit(ask(PROMPT, 8))
        with pytest.raises(EngineError, match="ZeroDivisionError"):
            await collect(waiting)
        with pytest.raises(EngineError):
            engine.submit(ask(PROMPT, 8))
        engine._batch.blocks.give_back(waiting.session.table)


async def test_closing_ends_running_sessions_with_a_typed_error(checkpoint):
    async with engine_of(checkpoint) as engine:
        running = engine.submit(ask(PROMPT, 400))
        await anext(running)
        await engine.close()
        await engine.close()
        with pytest.raises(CancelledByOperatorError):
            await collect(running)
        with pytest.raises(EngineError, match="closed"):
            engine.submit(ask(PROMPT, 4))


# --- weights and memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "gemma"])
def test_every_stored_tensor_is_a_view_of_the_buffer(tmp_path, family):
    checkpoint = make_checkpoint(tmp_path, "m", family)
    with CpuDevice(1 << 30) as device:
        weights = Weights(checkpoint, device)
        model = build_skeleton(checkpoint.path)
        bind(model, checkpoint.index, weights.parts)
        start = weights.buffer.array.ctypes.data
        stored = {*(e.name for e in checkpoint.index.tensors), *dict(checkpoint.index.aliases)}
        tensors = model.state_dict(keep_vars=True)
        assert set(tensors) == stored
        for tensor in tensors.values():
            assert start <= tensor.data_ptr() < start + weights.buffer.size
        for alias, name in checkpoint.index.aliases:
            assert tensors[alias] is tensors[name]
        assert all(not buffer.is_meta for buffer in model.buffers())
        del tensors, tensor
        unbind(model)
        weights.buffer.close()


def test_an_index_that_does_not_fit_the_module_is_refused(tmp_path):
    llama, gpt = make_checkpoint(tmp_path, "a"), make_checkpoint(tmp_path, "b", "gpt2")
    with CpuDevice(1 << 30) as device:
        weights = Weights(gpt, device)
        model = build_skeleton(llama.path)
        with pytest.raises(CheckpointFormatError, match="no tensor of the module"):
            bind(model, gpt.index, weights.parts)
        wide = make_checkpoint(tmp_path, "c", intermediate_size=256)
        with pytest.raises(CheckpointFormatError, match="has shape"):
            bind(build_skeleton(llama.path), wide.index, Weights(wide, device).parts)
        short = wide.index.__class__(
            **{f: getattr(llama.index, f) for f in wide.index.__slots__} | {"tensors": ()}
        )
        with pytest.raises(CheckpointFormatError, match="no bytes for"):
            bind(build_skeleton(llama.path), short, weights.parts)
        device._ledger._used = 0


def test_the_forward_order_follows_the_forward_pass(tmp_path):
    order = forward_order(build_skeleton(make_checkpoint(tmp_path, "m").path))
    places = [
        order.index(f"model.{name}.weight")
        for name in (
            "embed_tokens", "layers.0.input_layernorm", "layers.0.self_attn.q_proj",
            "layers.0.mlp.down_proj", "layers.1.input_layernorm", "norm",
        )
    ]  # fmt: skip
    assert places == sorted(places)
    assert order[-1] == "lm_head.weight"


@pytest.mark.parametrize("family", ["bloom", "falcon", "gpt_neo"])
def test_an_architecture_that_is_not_served_is_named(tmp_path, family):
    with pytest.raises(UnsupportedArchitectureError) as caught:
        build_skeleton(make_source(tmp_path / "m", family))
    assert caught.value.architecture in str(caught.value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "dynamic",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
    ],
)
def test_a_config_that_would_be_served_wrongly_is_refused(tmp_path, change, problem):
    import json

    folder = make_source(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UnsupportedArchitectureError, match=problem):
        build_skeleton(folder)


async def open_with(checkpoint, device, **config):
    engines = engines_of(device, EngineConfig(**config), ManualClock())
    try:
        weights = Weights(checkpoint, device)
        codec = await engines.load_codec(checkpoint.path)
        try:
            return await engines.open(weights, await engines.skeleton(checkpoint), codec)
        finally:
            weights.buffer.close()
    finally:
        engines.close()


async def test_no_room_for_kv_memory_is_told_and_nothing_stays(checkpoint):
    with CpuDevice(checkpoint.index.size + 4096) as device:
        with pytest.raises(DeviceMemoryError):
            await open_with(checkpoint, device)
        with pytest.raises(KvMemoryError, match="raise that in the node's config"):
            await open_with(checkpoint, device, kv_cache_bytes=ByteSize(100))
        assert device.memory_used == 0


async def test_weights_that_do_not_bind_leave_nothing_behind(checkpoint, tmp_path):
    other = make_checkpoint(tmp_path, "m", "gpt2")
    mixed = checkpoint.__class__(checkpoint.model, checkpoint.path, other.index, ())
    with CpuDevice(1 << 30) as device:
        engines = engines_of(device, EngineConfig(), ManualClock())
        weights = Weights(other, device)
        weights.checkpoint = mixed
        codec = await engines.load_codec(checkpoint.path)
        with pytest.raises(CheckpointFormatError):
            await engines.open(weights, await engines.skeleton(checkpoint), codec)
        weights.buffer.close()
        engines.close()
        assert device.memory_used == 0


async def test_warming_survives_a_checkpoint_with_problems(checkpoint, tmp_path):
    engines = engines_of(CpuDevice(1 << 20), EngineConfig(), ManualClock())
    broken = checkpoint.__class__(checkpoint.model, tmp_path, checkpoint.index, ())
    await engines.warm([broken])
    await engines.warm([checkpoint])
    engines.close()


async def test_limits_are_known_before_a_load(checkpoint):
    engines = engines_of(CpuDevice(1 << 20), EngineConfig(), ManualClock())
    config = EngineConfig()
    assert engines.shares(checkpoint)[0].size == checkpoint.index.size + config.kv_cache_bytes
    assert engines.context_limit(checkpoint) == 512
    engines.check_request(ask(PROMPT, 4), checkpoint)
    with pytest.raises(PromptTooLongError):
        engines.check_request(ask(PROMPT, 512), checkpoint)
    config = EngineConfig(kv_cache_bytes=ByteSize(40 << 10))
    small = engines_of(CpuDevice(1 << 20), config, ManualClock())
    await small.load_codec(checkpoint.path)
    assert small.context_limit(checkpoint) == 80  # 40 KiB over 512 bytes a token
    small.check_request(ask(PROMPT, 80 - len(PROMPT)), checkpoint)
    with pytest.raises(PromptTooLongError, match="kv_cache_bytes"):
        small.check_request(ask(PROMPT, 81 - len(PROMPT)), checkpoint)
    engines.close()
    small.close()


async def test_what_fits_is_known_from_the_start_of_the_node(checkpoint):
    config = EngineConfig(kv_cache_bytes=ByteSize(40 << 10))
    engines = engines_of(CpuDevice(1 << 20), config, ManualClock())
    await engines.warm([checkpoint])
    assert engines.context_limit(checkpoint) == 80
    engines.close()


async def test_an_open_ended_session_ends_where_the_room_does(checkpoint):
    open_ended = ask(PROMPT, 500, open_ended=True)
    async with engine_of(checkpoint, kv_cache_bytes=ByteSize(40 << 10)) as engine:
        _, tokens, _, finish = await collect(engine.submit(open_ended))
        assert (len(tokens), finish) == (80 - len(PROMPT), "length")
        last = replace(open_ended, resumed=tokens[:-1])
        assert (await collect(engine.submit(last)))[1] == tokens[-1:]
        with pytest.raises(PromptTooLongError, match=r"81 tokens but KV memory .* allows 80"):
            engine.submit(replace(open_ended, resumed=tokens))
        few = replace(open_ended, max_tokens=7)
        assert len((await collect(engine.submit(few)))[1]) == 7


async def test_a_job_that_hangs_is_told_as_a_stall():
    clock = ManualClock()
    engines = engines_of(CpuDevice(4096), EngineConfig(stall_after_s=5.0), clock)
    begun, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def hang():
        loop.call_soon_threadsafe(begun.set)
        go_on.wait()

    task = asyncio.create_task(engines._steps["cpu"].run(hang))
    await begun.wait()
    clock.advance(5.0)
    assert engines.stalled() is None
    clock.advance(1.0)
    assert "6 s" in engines.stalled().reason
    go_on.set()
    await task
    assert engines.stalled() is None
    engines.close()


async def test_the_step_thread_takes_its_number_of_torch_threads():
    before = torch.get_num_threads()
    steps = StepThread(ManualClock(), Gate(), 1)
    assert await steps.run(torch.get_num_threads) == 1
    steps.close()
    torch.set_num_threads(before)


async def test_a_job_that_runs_alone_runs_beside_no_step():
    gate = Gate()
    one, two = (StepThread(ManualClock(), gate, 1) for _ in range(2))
    inside, together, proceed = [], [], threading.Event()

    def step():
        inside.append(1)
        proceed.wait(10)
        inside.pop()

    def alone():
        together.append(len(inside))

    stepping = asyncio.create_task(one.run(step))
    building = asyncio.create_task(two.run_alone(alone))
    while not inside:
        await asyncio.sleep(0)
    later = asyncio.create_task(one.run(alone))
    proceed.set()
    await asyncio.gather(stepping, building, later)
    assert together == [0, 0]
    one.close()
    two.close()


async def test_what_resumed_is_a_whole_answer_generates_nothing_more(checkpoint):
    async with engine_of(checkpoint) as engine:
        eos = next(iter(engine._parts.codec.eos_ids))
        ended = ask(PROMPT, 9, resumed=(40, 41, eos), ignore_eos=False)
        assert await collect(engine.submit(ended)) == ("", (), (), "stop")
        text, tokens, *_ = await collect(engine.submit(ask(PROMPT, 12, SAMPLED)))
        stopped = ask(PROMPT, 20, SAMPLED, stop=(text[2:5],), resumed=tokens)
        (chunk,) = [chunk async for chunk in engine.submit(stopped)]
        assert (chunk.tokens, chunk.finish, chunk.stop_text) == ((), "stop", text[2:5])
        assert engine.running == engine.waiting == 0


async def test_who_closes_second_waits_as_well(checkpoint):
    async with engine_of(checkpoint) as engine:
        await anext(engine.submit(ask(PROMPT, 400)))
        await asyncio.gather(engine.close(), engine.close())
        assert all(buffer.mapped == set() for buffer in engine._parts.buffers)


async def test_what_a_reader_left_is_one_chunk_when_it_comes(checkpoint):
    async with engine_of(checkpoint) as engine:
        generation = engine.submit(ask(PROMPT, 12))
        while not generation.is_ended:
            await asyncio.sleep(0)
        (chunk,) = [chunk async for chunk in generation]
        assert len(chunk.tokens) == 12
        assert chunk.finish == "length"
