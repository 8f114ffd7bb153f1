import pytest
from tokenizers import Regex, Tokenizer, decoders, models

from sllm_node.engine.text import load_codec
from sllm_node.engine.token_bytes import TokenBytes
from tests.models import make_tokenizer

WORDS = ["▁the", "the", "<0xE6>", "<0x61>", "日", "##s", "Ġa"]
REPLACE, FALLBACK = decoders.Replace("▁", " "), decoders.ByteFallback()


def bytes_with(decoder):
    """Return what each of `WORDS` and a special token stands for."""
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(WORDS)}, []))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["</s>"])
    return list(map(TokenBytes(tokenizer).of, range(len(WORDS) + 2)))


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Sequence([REPLACE, FALLBACK, decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([FALLBACK, decoders.Metaspace()]),
    ],
    ids=["llama", "metaspace"],
)
def test_sentencepieces_tokens_keep_their_space_and_their_bytes(decoder):
    assert bytes_with(decoder) == [
        b" the", b"the", b"\xe6", b"a", "日".encode(), b"##s", "Ġa".encode(), b"</s>", b"",
    ]  # fmt: skip


def test_tokens_of_the_byte_alphabet_are_bytes_and_others_their_own_text():
    assert bytes_with(decoders.ByteLevel()) == [
        "▁the".encode(), b"the", b"<0xE6>", b"<0x61>", "日".encode(), b"##s", b" a", b"</s>", b"",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "decoder", [None, decoders.WordPiece(), decoders.Sequence([decoders.Replace(Regex("s$"), "z")])]
)
def test_a_decoder_that_is_not_known_decodes_for_itself(decoder):
    assert bytes_with(decoder)[1] == b"the"


@pytest.mark.parametrize("text", ["日本語 naïve", "👩‍👩‍👧 family", " the\n"])
def test_the_bytes_of_a_texts_tokens_are_those_of_the_text(tmp_path, text):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    codec = load_codec(make_tokenizer(tmp_path))
    tokens = codec.encode(text, add_special_tokens=False)
    assert b"".join(map(codec.token_bytes, tokens)) == text.encode()


def test_parts_of_a_character_have_names_of_their_own(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    codec = load_codec(make_tokenizer(tmp_path))
    tokens = codec.encode("日", add_special_tokens=False)
    assert [codec.token_text(token) for token in tokens] == [
        "bytes:\\xe6", "bytes:\\x97", "bytes:\\xa5",
    ]  # fmt: skip
