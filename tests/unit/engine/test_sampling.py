import numpy as np
import pytest
import torch

from sllm_node.core.types import SamplingParameters
from sllm_node.engine.adjustments import adjustments
from sllm_node.engine.draw import sample
from sllm_node.engine.philox import philox4x32, uniforms
from sllm_node.engine.sampling import SamplingRow

VOCABULARY = 16
LOGITS = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(3)) * 2


def words(*values):
    return tuple(np.array([value], dtype=np.uint64) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers of the Random123 library
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)  # fmt: skip
def test_philox_gives_the_known_answers(counter, key, expected):
    assert tuple(int(word[0]) for word in philox4x32(words(*counter), words(*key))) == expected


def test_uniform_numbers_follow_from_seed_and_index_alone():
    together = uniforms([1, 2, 1], [0, 0, 1])
    assert [float(uniforms([s], [i])[0]) for s, i in ((1, 0), (2, 0), (1, 1))] == together.tolist()
    many = uniforms([7] * 4000, range(4000))
    assert ((many >= 0) & (many < 1)).all()
    assert abs(many.mean() - 0.5) < 0.02


def row_of(parameters, index, logprobs=None, prompt=(), output=()):
    return SamplingRow(parameters, index, logprobs, adjustments(parameters, prompt, output))


def draw(count=1, logits=LOGITS, output=(), prompt=(), **parameters):
    rows = [
        row_of(SamplingParameters(seed=seed, **parameters), 5, None, prompt, output)
        for seed in range(count)
    ]
    return [drawn.token for drawn in sample(logits.expand(count, -1), rows)]


def expected_distribution(logits, allowed=None):
    probabilities = logits.double().softmax(-1)
    if allowed is not None:
        mask = torch.zeros(VOCABULARY, dtype=torch.float64)
        mask[list(allowed)] = 1
        probabilities = probabilities * mask
    return (probabilities / probabilities.sum()).numpy()


def order():
    return LOGITS.argsort(descending=True).tolist()


@pytest.mark.parametrize(
    ("parameters", "logits", "allowed"),
    [
        ({}, LOGITS, None),
        ({"temperature": 0.5}, LOGITS / 0.5, None),
        ({"top_k": 3}, LOGITS, order()[:3]),
        ({"min_p": 0.2}, LOGITS, [i for i in range(VOCABULARY) if LOGITS[i] >= LOGITS.max() + np.log(0.2)]),
    ],
)  # fmt: skip
def test_tokens_are_drawn_from_the_exact_distribution(parameters, logits, allowed):
    count = 20_000
    found = np.bincount(draw(count, **parameters), minlength=VOCABULARY) / count
    expected = expected_distribution(logits, allowed)
    deviation = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(found - expected) <= 4.5 * deviation + 1e-9).all()


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    probabilities = LOGITS.softmax(-1)[order()]
    cumulative = probabilities.cumsum(-1)
    kept = int((cumulative < 0.7).sum()) + 1
    assert set(draw(3000, top_p=0.7)) == set(order()[:kept])


def test_greedy_takes_the_most_likely_token():
    assert draw(3, temperature=0.0) == [order()[0]] * 3


def test_the_same_row_gives_the_same_token_in_any_company():
    alone = [
        sample(LOGITS[None], [SamplingRow(SamplingParameters(seed=s, top_p=p), 2)])[0].token
        for s in range(20)
        for p in (1.0, 0.8)
    ]
    rows = [
        SamplingRow(SamplingParameters(seed=s, top_p=p), 2) for s in range(20) for p in (1.0, 0.8)
    ]
    assert [d.token for d in sample(LOGITS.expand(40, -1), rows)] == alone


def test_a_bias_can_force_or_forbid_a_token():
    worst, best = order()[-1], order()[0]
    assert set(draw(50, logit_bias=((worst, 100.0),))) == {worst}
    assert best not in draw(500, logit_bias=((best, -100.0),))


def test_penalties_count_as_they_are_defined():
    base = LOGITS[None].clone()
    best, second = order()[:2]
    gap = float(base[0, best] - base[0, second])
    for parameters, output, flips in [
        ({"presence_penalty": 2.0}, (best,), gap < 2),
        ({"frequency_penalty": 1.0}, (best,) * 5, gap < 5),
        ({"frequency_penalty": gap + 0.1}, (), False),
        ({"repetition_penalty": 10.0}, (best,), True),
    ]:
        token = draw(temperature=0.0, output=output, **parameters)[0]
        assert (token != best) is bool(flips), parameters


def test_the_repetition_penalty_sees_the_prompt_and_the_others_do_not():
    best = order()[0]
    assert draw(temperature=0.0, prompt=(best,), repetition_penalty=10.0)[0] != best
    assert draw(temperature=0.0, prompt=(best,), presence_penalty=2.0)[0] == best


def test_a_row_of_logits_that_are_no_numbers_spoils_itself_only():
    logits = LOGITS.repeat(3, 1)
    logits[1] = float("nan")
    rows = [SamplingRow(SamplingParameters(temperature=t), 0) for t in (0.0, 1.0, 1.0)]
    drawn = sample(logits, rows)
    assert [d.token >= 0 for d in drawn] == [True, False, True]


def test_logprobs_are_those_of_the_models_own_distribution():
    row = row_of(SamplingParameters(temperature=0.0, logit_bias=((3, 100.0),)), 0, 2)
    drawn = sample(LOGITS[None], [row])[0]
    expected = LOGITS.log_softmax(-1)
    assert drawn.token == 3
    assert drawn.logprob == pytest.approx(float(expected[3]), abs=1e-5)
    assert [token for token, _ in drawn.top] == order()[:2]
