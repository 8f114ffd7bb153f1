import pytest

from sllm_node.core.errors import InvalidRequestError, PromptTooLongError
from sllm_node.engine.refusals import check_capacity, check_request, ended_by_room
from tests.unit.engine.rig import ask

CONTEXT, VOCABULARY = 64, 100


@pytest.mark.parametrize(
    ("prompt", "more", "param"),
    [
        ((), {}, "prompt"),
        ((1, VOCABULARY), {}, "prompt"),
        ((1, -1), {}, "prompt"),
        ((1,), {"resumed": (VOCABULARY,)}, "prompt"),
        ((1,), {"logprobs": -1}, "logprobs"),
        ((1,), {"stop": ("a", "")}, "stop"),
        ((1,), {"max_tokens": 2, "resumed": (3, 4)}, "max_tokens"),
    ],
)
def test_what_can_never_be_served_is_refused_by_its_field(prompt, more, param):
    with pytest.raises(InvalidRequestError) as caught:
        check_request(ask(prompt, **more), CONTEXT, VOCABULARY)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "check",
    [lambda wish: check_request(wish, CONTEXT, None), lambda wish: check_capacity(wish, CONTEXT)],
)
def test_prompt_and_output_may_fill_a_limit_and_not_exceed_it(check):
    check(ask(range(CONTEXT - 12), 12))
    with pytest.raises(PromptTooLongError):
        check(ask(range(CONTEXT - 11), 12))


def test_an_open_ended_request_needs_room_for_its_next_token_and_ends_with_the_room():
    wish = ask(range(CONTEXT - 3), 500, open_ended=True, resumed=(1, 2))
    check_request(wish, CONTEXT, None)
    check_capacity(wish, CONTEXT)
    assert ended_by_room(wish, CONTEXT).max_tokens == 3
    assert ended_by_room(wish, 1000) is wish
    limited = ask(range(3), 500)
    assert ended_by_room(limited, CONTEXT) is limited
    with pytest.raises(PromptTooLongError, match=r"shorten the prompt$") as caught:
        check_capacity(wish, CONTEXT - 1)
    assert (caught.value.tokens, caught.value.param) == (CONTEXT, "prompt")


def test_without_a_known_vocabulary_any_token_is_taken():
    check_request(ask((10**9,)), CONTEXT, None)
