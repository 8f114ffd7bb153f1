from sllm_node.core.types import TokenLogprob
from sllm_node.server.responses import ChatShape, Choice, CompletionShape, Reply, Usage

REPLY = Reply("id", "m", 7, with_logprobs=True)
HALF = "bytes:\\xe6\\x97"
TOP = ((1, HALF, -0.1), (2, " the", -0.2), (3, "the", -0.3), (4, "the", -0.4))


def logprobs_of(shape, *entries):
    choice = Choice(0, logprobs=list(entries), finish="stop")
    return shape.whole(REPLY, [choice], Usage())["choices"][0]["logprobs"]


def test_bytes_of_a_log_probability_are_those_of_the_token_and_not_of_its_name():
    (entry,) = logprobs_of(ChatShape(), TokenLogprob(1, HALF, -0.1, TOP))["content"]
    assert (entry["token"], entry["bytes"]) == (HALF, [0xE6, 0x97])
    assert [top["bytes"] for top in entry["top_logprobs"][:2]] == [[0xE6, 0x97], list(b" the")]


def test_a_completions_log_probabilities_have_the_sampled_token_beside_the_likeliest():
    sampled, likely = TokenLogprob(9, " rare", -7.0, TOP), TokenLogprob(1, HALF, -0.1, TOP)
    found = logprobs_of(CompletionShape(), sampled, likely)["top_logprobs"]
    best = {HALF: -0.1, " the": -0.2, "the": -0.3}
    assert found == [{**best, " rare": -7.0}, best]
    assert logprobs_of(CompletionShape(), TokenLogprob(9, "x", -7.0))["top_logprobs"] == [
        {"x": -7.0}
    ]
