"""The bytes of a text's tokens are the text's bytes."""

import lzma
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from lin_jax import errors
from lin_jax.data import Tokenizer
from lin_jax.data.tokenizers.sentencepiece import read_sentencepiece
from lin_jax.data.tokenizers.token_bytes import token_bytes

TEXTS = [
    "def add(a, b):\n    return a + b\n" * 5,
    "The café is open — naïve 😀 日本語.",
    Path(errors.__file__).read_text(),
]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(TEXTS, 400)


def spell(tokenizer: Tokenizer, text: str) -> bytes:
    pieces = token_bytes(tokenizer)
    assert len(pieces) == tokenizer.vocab_size
    return b"".join(pieces[number] for number in tokenizer.encode(text))


def stories(folder: Path) -> list[str]:
    with lzma.open(folder / "tinystories" / "v2_train_head.txt.xz", "rt", encoding="utf-8") as file:
        return [story.strip() for story in file.read(20_000).split("<|endoftext|>")][:-1]


@given(text=st.text())
def test_trained_byte_level(trained: Tokenizer, text: str) -> None:
    assert spell(trained, text) == text.replace("<|endoftext|>", "").encode()


def test_special_and_added_tokens_and_holes() -> None:
    words = {"a": 0, "b": 3, "Ġ": 4, "<|end|>": 6, "two words": 7}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    backend.add_tokens(["two words"])
    assert token_bytes(Tokenizer(backend)) == [b"a", b"", b"", b"b", b" ", b"", b"", b"two words"]


def test_gpt2(shared_data: Path) -> None:
    folder = shared_data / "tokenizers" / "gpt2"
    backend = tokenizers.ByteLevelBPETokenizer.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(backend.to_str()), eos_token="<|endoftext|>")
    text = "\n".join([*TEXTS, *stories(shared_data)])
    assert spell(tokenizer, text) == text.encode()


@pytest.mark.parametrize(
    ("name", "vocab_size"),
    [
        ("checkpoints/stories260K/tok512.bin", 512),
        ("checkpoints/babyllama105/tok105.model", 361),
        ("tokenizers/llama2/tokenizer.bin", 32000),
    ],
)
def test_sentence_pieces(name: str, vocab_size: int, shared_data: Path) -> None:
    tokenizer = read_sentencepiece(shared_data / name, vocab_size)
    pieces = token_bytes(tokenizer)
    assert pieces[:3] == [b"", b"", b""]
    for text in [*TEXTS, *stories(shared_data)]:
        assert b"".join(pieces[number] for number in tokenizer.encode(text)) == b" " + text.encode()


def with_marks(decoder: tokenizers.decoders.Decoder) -> Tokenizer:
    """A vocabulary of characters with word-start marks and of bytes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcde."]
    numbers = {piece: number for number, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(numbers, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    backend.decoder = decoder
    backend.add_special_tokens(["<unk>"])
    return Tokenizer(backend)


def test_marks_and_bytes_of_fast_tokenizers() -> None:
    decoders = tokenizers.decoders
    text = "a cab. dé\n日 e"
    replaces = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    assert spell(with_marks(replaces), text) == text.encode()
    nested = decoders.Sequence([decoders.ByteFallback(), decoders.Sequence([decoders.Metaspace()])])
    assert spell(with_marks(nested), text) == text.encode()
    # Without ByteFallback a byte token is written as it is spelled.
    assert spell(with_marks(decoders.Metaspace()), "a\nb") == b"a<0x0A>b"


def test_others_by_what_they_print(shared_data: Path) -> None:
    bert = tokenizers.BertWordPieceTokenizer(str(shared_data / "tokenizers/bert-base-uncased/vocab.txt"))
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(bert.to_str()))
    text = "an unaffable tokenizer is not a problem. it splits words"
    assert spell(tokenizer, text) == b" " + text.encode()
    assert token_bytes(tokenizer)[tokenizer.backend.token_to_id("[CLS]")] == b""
    undecoded = tokenizers.Tokenizer(tokenizers.models.WordLevel({"one": 0, "two": 1, "!": 2}, unk_token="!"))
    assert token_bytes(Tokenizer(undecoded)) == [b" one", b" two", b" !"]
