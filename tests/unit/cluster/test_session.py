from sllm_node.cluster.migration_messages import Piece
from sllm_node.cluster.session import EntrySession
from sllm_node.engine.text import TextState
from tests.unit.cluster.migration_rig import session_request

WORDS = {1: "He", 2: "llo", 3: " wor", 4: "ld st", 5: "op now"}


def decode(tokens):
    return "".join(WORDS[token] for token in tokens)


def test_tokens_are_counted_from_the_prompts_first():
    session = EntrySession.begin(session_request(prompt=(1, 2, 3)))
    session.take(Piece((7, 8)))
    assert session.length == 5
    assert session.tokens(0, 9) == (1, 2, 3, 7, 8)
    assert session.tokens(2, 2) == (3, 7)
    assert session.tokens(4, 9) == (8,)
    assert session.tokens(5, 9) == ()


def test_a_continuation_has_all_that_came_and_nothing_else_changed():
    request = session_request(stop=("x",), resumed=(7,))
    session = EntrySession.begin(request)
    session.take(Piece((8,), cached_tokens=2))
    session.take(Piece((9,), cached_tokens=5, finish="stop"))
    assert session.continuation().resumed == (7, 8, 9)
    assert session.continuation().stop == ("x",)
    assert (session.completion_tokens, session.cached_tokens, session.finish) == (3, 2, "stop")
    assert session.without_tokens().prompt == session.without_tokens().resumed == ()


def test_text_and_stop_strings_go_on_at_another_owner_where_they_were():
    tokens, stops = (1, 2, 3, 4, 5), ("stop",)
    whole = TextState.begin(decode, stops, ())
    texts = [whole.add(token) for token in tokens]
    for cut in range(len(tokens)):
        session = EntrySession.begin(session_request(stop=stops))
        for token, text in zip(tokens[:cut], texts, strict=False):
            session.take(Piece((token,), text))
        request = session.continuation()
        state = TextState.begin(decode, request.stop, request.resumed)
        assert [state.add(token) for token in tokens[cut:]] == texts[cut:]
        assert state.scanner.found == "stop"
