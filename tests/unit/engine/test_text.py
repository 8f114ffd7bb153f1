import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_node.core.errors import CheckpointFormatError, InvalidRequestError, PromptTooLongError
from sllm_node.engine.text import Detokenizer, StopScanner, TextState, load_codec
from tests.models import make_source, make_tokenizer


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return load_codec(make_source(tmp_path_factory.mktemp("codec") / "m"))


def pieces(codec, tokens):
    detokenizer = Detokenizer(codec.decode)
    return [detokenizer.add(token) for token in tokens], detokenizer.flush()


@pytest.mark.parametrize(
    "text", ["Hello there", "naïve café", "日本語です", "👩‍👩‍👧 family", " spaces  here\n"]
)
def test_text_comes_back_piece_by_piece(codec, text):
    shown, rest = pieces(codec, codec.encode(text, add_special_tokens=False))
    assert "".join(shown) + rest == text
    assert not any("\ufffd" in piece for piece in shown)


@settings(deadline=None, derandomize=True)
@given(text=st.text(max_size=200))
def test_any_text_comes_back(codec, text):
    shown, rest = pieces(codec, codec.encode(text, add_special_tokens=False))
    assert "".join(shown) + rest == text


def test_half_a_character_at_the_end_is_shown_as_replacement(codec):
    tokens = codec.encode("日", add_special_tokens=False)
    shown, rest = pieces(codec, tokens[:-1])
    assert "".join(shown) == ""
    assert set(rest) == {"\ufffd"}


def test_tokens_that_never_become_a_character_are_not_held_for_ever(codec):
    token = codec.encode("日", add_special_tokens=False)[0]
    shown, _ = pieces(codec, [token] * 40)
    assert len("".join(shown)) >= 30


@pytest.fixture(scope="module")
def sentences():
    """A tokenizer like SentencePiece's: spaces inside the tokens, the first one stripped."""
    from tokenizers import Tokenizer, decoders, models

    words = ["<unk>", "<tool>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "▁▁", "▁Hello", "▁world", "a", "日", "!"]
    tokenizer = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )  # fmt: skip
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    tokenizer.add_special_tokens(["<unk>", "<tool>"])
    return tokenizer


_PIECES = st.sampled_from(
    ["▁", "▁▁", "▁Hello", "▁world", "a", "日", "!", "<tool>", "<0xE6>", "<0x97>", "<0xA5>"]
)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.lists(_PIECES, max_size=12))
def test_spaces_between_words_are_kept_also_around_tokens_that_do_not_show(sentences, words):
    tokens = [sentences.token_to_id(word) for word in words]
    detokenizer = Detokenizer(sentences.decode)
    shown = "".join(detokenizer.add(token) for token in tokens) + detokenizer.flush()
    assert shown == sentences.decode(tokens)


def test_the_text_goes_on_from_the_prompt_with_its_space(sentences):
    prompt, token = [sentences.token_to_id(word) for word in ("▁Hello", "▁world")]
    state = TextState.begin(sentences.decode, (), (), (prompt,))
    assert state.add(token) + state.flush() == " world"


def shown_after(decode, prompt, tokens):
    state = TextState.begin(decode, (), (), tuple(prompt))
    return "".join([*map(state.add, tokens), state.flush()])


@pytest.mark.parametrize("text", ["日本語は難しい", "a日b", "👩‍👩‍👧", "a\ufffd日"])
def test_a_character_that_begins_in_the_prompt_is_shown_when_it_is_whole(codec, text):
    tokens = codec.encode(text, add_special_tokens=False)
    for cut in range(1, len(tokens)):
        whole = codec.decode(tokens[:cut]).rstrip("\ufffd")
        shown = shown_after(codec.decode, tokens[:cut], tokens[cut:])
        assert shown.lstrip("\ufffd") == text.removeprefix(whole).lstrip("\ufffd")


def test_a_character_of_a_prompt_in_bytes_is_shown_when_it_is_whole(sentences):
    words = [f"<0x{byte:02X}>" for byte in "日本語は難しい".encode()]
    tokens = [sentences.token_to_id(word) for word in words]
    for cut in range(1, len(tokens)):
        rest = "日本語は難しい"[cut // 3 :]
        assert shown_after(sentences.decode, tokens[:cut], tokens[cut:]) == rest


def test_half_a_character_at_the_end_of_the_prompt_is_not_shown_if_nothing_comes_of_it(codec):
    half, then = codec.encode("日", add_special_tokens=False)[:1], codec.encode("a")[-1]
    assert shown_after(codec.decode, half, [then]) == "a"
    mark = codec.encode("bad \ufffd", add_special_tokens=False)
    assert shown_after(codec.decode, mark, [then]) == "a"


def test_many_tokens_that_do_not_show_cost_no_more_than_a_few(sentences):
    seen = []

    def decode(tokens):
        seen.append(len(tokens))
        return sentences.decode(tokens)

    detokenizer = Detokenizer(decode)
    for _ in range(500):
        assert detokenizer.add(sentences.token_to_id("<tool>")) == ""
    assert max(seen) < 100
    assert detokenizer.add(sentences.token_to_id("a")) == "a"


def test_no_text_is_cut_or_padded_because_the_tokenizers_file_says_so(tmp_path):
    folder = make_source(tmp_path / "m")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["truncation"] = {
        "direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    content["padding"] = {
        "strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 319, "pad_type_id": 0, "pad_token": "<|pad|>",
    }  # fmt: skip
    file.write_text(json.dumps(content))
    codec = load_codec(folder)
    for text in ("a", "much longer than eight tokens can be, and than sixteen"):
        assert codec.decode(codec.encode(text)) == text
        assert codec.encode(text)[-1] != 319


def test_special_tokens_end_but_do_not_show(codec):
    eos = next(iter(codec.eos_ids))
    assert codec.decode([eos]) == ""
    assert codec.decode([eos], with_special=True) == "<|im_end|>"
    assert codec.token_text(eos) == "<|im_end|>"


def scan(stops, parts):
    scanner = StopScanner(stops)
    shown = ""
    for part in parts:
        shown += scanner.add(part)
        if scanner.found:
            return shown, scanner.found
    return shown + scanner.flush(), None


@pytest.mark.parametrize(
    ("stops", "parts", "expected"),
    [
        (["END"], ["abcE", "N", "Dxyz"], ("abc", "END")),
        (["END"], ["abcE", "NE", "ND"], ("abcE" + "N", "END")),
        (["END"], ["abcE", "N"], ("abcEN", None)),
        (["b", "ab"], ["xab"], ("x", "ab")),
        (["bc", "b"], ["abc"], ("a", "bc")),
        ([], ["abc"], ("abc", None)),
        (["aab"], ["aa", "ab"], ("a", "aab")),
    ],
)
def test_stop_strings_are_found_across_pieces(stops, parts, expected):
    assert scan(stops, parts) == expected


@settings(deadline=None, derandomize=True)
@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.data(),
)
def test_how_text_is_cut_makes_no_difference(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    parts = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    shown, found = scan(stops, parts)
    places = [(text.find(stop), -len(stop)) for stop in stops if stop in text]
    assert shown == (text[: min(places)[0]] if places else text)
    assert (found is not None) == bool(places)


SPOKEN = "Hi<|im_end|>\n<|im_start|>user"


@pytest.mark.parametrize(
    ("stops", "shown", "found"),
    [
        (["<|im_end|>"], "Hi", "<|im_end|>"),
        (["<|im_start|>user", "user"], "Hi\n", "<|im_start|>user"),
        (["i<|im_end|>\n"], "H", "i<|im_end|>\n"),
        (["<|im_end|>\n<|im_start|>"], "Hi", "<|im_end|>\n<|im_start|>"),
        (["<|im_end|>x", "zz"], "Hi\nuser", None),
        (["<|pad|>"], "Hi\nuser", None),
    ],
)
def test_a_stop_string_may_be_written_with_special_tokens_that_do_not_show(
    codec, stops, shown, found
):
    tokens = codec.encode(SPOKEN, add_special_tokens=False)
    state, text = codec.text_state(stops), ""
    for position, token in enumerate(tokens):
        resumed = codec.text_state(stops, tokens[:position])
        piece = state.add(token)
        assert (piece, state.scanner.found) == (resumed.add(token), resumed.scanner.found)
        text += piece
        if state.scanner.found is not None:
            break
    else:
        text += state.flush()
    assert (text, state.scanner.found) == (shown, found)


def test_a_special_token_that_stops_leaves_no_text_behind(codec):
    (end,) = codec.encode("<|im_end|>", add_special_tokens=False)
    for before, shown in (
        (codec.encode("aE", add_special_tokens=False), "aE"),
        (codec.encode("日", add_special_tokens=False)[:1], "\ufffd"),
    ):
        state = codec.text_state(["END", "<|im_end|>"])
        assert "".join(map(state.add, (*before, end))) == shown
        assert state.scanner.found == "<|im_end|>"


def test_a_resumed_session_goes_on_with_the_same_text(codec):
    tokens = codec.encode("one two日本 three END four", add_special_tokens=False)
    whole = TextState.begin(codec.decode, ["END"], ())
    shown = [whole.add(token) for token in tokens]
    for cut in range(len(tokens)):
        resumed = TextState.begin(codec.decode, ["END"], tokens[:cut])
        if resumed.scanner.found is None:
            rest = [resumed.add(token) for token in tokens[cut:]]
            assert rest == shown[cut:]


def test_the_chat_template_is_rendered_up_to_the_assistant(codec):
    tokens = codec.render_chat([{"role": "user", "content": "Hi"}])
    assert "".join(codec.token_text(t) for t in tokens) == (
        "<|bos|><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_name_of_a_message_is_in_the_prompt_where_the_template_reads_it(tmp_path):
    folder = make_source(tmp_path / "m")
    named = {"role": "user", "content": "Hi", "name": "the"}
    unread = load_codec(folder).render_chat([named])
    (folder / "chat_template.jinja").write_text("{{ messages[0].name }}: {{ messages[0].content }}")
    codec = load_codec(folder)
    assert codec.decode(codec.render_chat([named])) == "the: Hi"
    assert unread == load_codec(make_source(tmp_path / "n")).render_chat(
        [{"role": "user", "content": "Hi"}]
    )


def test_a_model_without_a_template_or_that_refuses_says_so(tmp_path):
    folder = make_source(tmp_path / "m")
    for file in ("chat_template.jinja", "tokenizer_config.json"):
        path = folder / file
        if path.suffix == ".jinja":
            path.write_text("{{ raise_exception('no systems here') }}")
    with pytest.raises(InvalidRequestError, match="no systems here"):
        load_codec(folder).render_chat([{"role": "system", "content": "x"}])
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InvalidRequestError, match="has no chat template") as caught:
        load_codec(folder).render_chat([{"role": "user", "content": "x"}])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"eos_token_id": [5, 6]}, {5, 6, 317}),
        ({"eos_token_id": None}, {7, 8, 317}),
        ({}, {7, 8, 317}),
        (None, {7, 8, 317}),
    ],
)
def test_end_tokens_are_those_of_the_generation_config_or_else_the_config(
    tmp_path, generation, expected
):
    folder = make_tokenizer(tmp_path)
    (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": [7, 8]}')
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    codec = load_codec(folder)
    assert codec.eos_ids == expected


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointFormatError, match="tokenizer"):
        load_codec(tmp_path)


# --- long prompts ---------------------------------------------------------------------------------


def test_a_text_that_no_tokens_within_the_limit_can_hold_is_refused_before_it_is_tokenized(codec):
    codec_tokens = codec.encode("the " * 100)
    assert codec.encode("the " * 100, limit=len(codec_tokens)) == codec_tokens
    with pytest.raises(PromptTooLongError, match="at least") as caught:
        codec.encode("the " * 10_000, limit=100)
    assert (caught.value.param, caught.value.limit) == ("prompt", 100)
    with pytest.raises(PromptTooLongError) as caught:
        codec.render_chat([{"role": "user", "content": "the " * 10_000}], limit=100)
    assert caught.value.param == "messages"


@settings(deadline=None, derandomize=True)
@given(text=st.text(max_size=300) | st.text("the anin", max_size=300))
def test_the_length_of_a_text_never_refuses_one_that_fits(codec, text):
    tokens = codec.encode(text, add_special_tokens=False)
    assert codec.encode(text, add_special_tokens=False, limit=len(tokens)) == tokens


def test_characters_are_counted_when_they_are_whole(codec):
    detokenizer = Detokenizer(codec.decode)
    places = []
    for token in codec.encode("a日b", add_special_tokens=False):
        places.append(detokenizer.characters)
        detokenizer.add(token)
    assert places == [0, 1, 1, 1, 2]
