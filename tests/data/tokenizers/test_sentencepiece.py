"""Tokenizers of llama2.c and SentencePiece against the slow loop that defines them."""

import lzma
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from support.vocabularies import write_vocab

from lin_jax.data.tokenizers.sentencepiece import BYTES, SPECIAL, VocabularyPiece, build_tokenizer, read_sentencepiece
from lin_jax.errors import UserError

# Merges that chain, that overlap, that tie, and runs of spaces as Llama 2 has them.
MERGED = ["he", " the", "t h", "aa", "aaa", "ab", "aba", "ba", "th", "hen", " t", "\u4e2d\u6587"]
LETTERS = [*" abehnt,", "\u4e2d", "\u6587"]
RUNS = [VocabularyPiece(" " * length, -1e9) for length in range(2, 17)]
PIECES = [
    *(VocabularyPiece(text, 0.0) for text in (*SPECIAL, *BYTES)),
    *RUNS,
    *(VocabularyPiece(text, -float(rank)) for rank, text in enumerate(MERGED)),
    *(VocabularyPiece(text, -100.0 - rank) for rank, text in enumerate(LETTERS)),
]


def encode_slowly(pieces: Sequence[VocabularyPiece], text: str) -> list[int]:
    """One space in front, characters (or bytes), then the neighbouring pair with the best score, the leftmost first."""
    vocabulary = {piece.text: token for token, piece in enumerate(pieces)}
    tokens: list[int] = []
    for character in " " + text if text else text:
        if character in vocabulary:
            tokens.append(vocabulary[character])
        elif BYTES[0] in vocabulary:
            tokens += [byte + 3 for byte in character.encode()]
        else:
            tokens.append(0)
    while True:
        best: tuple[float, int, int] | None = None
        for place in range(len(tokens) - 1):
            merged = vocabulary.get(pieces[tokens[place]].text + pieces[tokens[place + 1]].text)
            if merged is not None and (best is None or pieces[merged].score > best[0]):
                best = (pieces[merged].score, place, merged)
        if best is None:
            return tokens
        tokens[best[1] : best[1] + 2] = [best[2]]


def random_texts(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    alphabets = ["ab ", " ", "a", "then ,", "\u2581 \nx\u4e2d\u6587\u00e9", "ab \u4e2d\U0001f600<>0x41"]
    return ["".join(rng.choice(list(each), rng.integers(0, 60))) for each in alphabets for _ in range(count)]


def write_bin(path: Path, pieces: Sequence[VocabularyPiece]) -> None:
    entries = [(piece.score, piece.text.encode()) for piece in pieces]
    body = b"".join(struct.pack("<fi", score, len(text)) + text for score, text in entries)
    path.write_bytes(struct.pack("<i", max(len(text) for _, text in entries)) + body)


def varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def write_model(path: Path, pieces: Sequence[VocabularyPiece], *, algorithm: int = 2, charsmap: bytes = b"") -> None:
    """A protocol buffer as SentencePiece writes it."""
    body = b""
    for piece in pieces:
        text = piece.text.replace(" ", "\u2581").encode()
        body += field(1, field(1, text) + b"\x15" + struct.pack("<f", piece.score) + b"\x18\x01")
    path.write_bytes(
        body + field(2, b"\x18" + bytes([algorithm])) + field(3, field(1, b"identity") + field(2, charsmap))
    )


WRITERS: dict[str, Callable[[Path, Sequence[VocabularyPiece]], None]] = {
    "bin": write_bin,
    "model": write_model,
    "vocab": write_vocab,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_against_the_slow_loop(kind: str, tmp_path: Path) -> None:
    WRITERS[kind](tmp_path / f"t.{kind}", PIECES)
    tokenizer = read_sentencepiece(tmp_path / f"t.{kind}", len(PIECES))
    assert tokenizer.vocab_size == len(PIECES)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    for text in random_texts(60):
        assert tokenizer.encode(text).tolist() == encode_slowly(PIECES, text), repr(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes_are_added(tmp_path: Path) -> None:
    """A vocabulary of characters, for a model that has 256 entries more than it."""
    characters = [*(VocabularyPiece(text, 0.0) for text in SPECIAL), *(VocabularyPiece(text, -1.0) for text in " ab")]
    write_vocab(tmp_path / "t.vocab", characters)
    plain = read_sentencepiece(tmp_path / "t.vocab", 6)
    assert plain.encode("a\nb").tolist() == [3, 4, 0, 5]
    wide = read_sentencepiece(tmp_path / "t.vocab", 262)
    assert wide.encode("a\nb").tolist() == [259, 260, 3 + 10, 261]
    assert wide.decode(wide.encode("a\nb \u00e9")) == "a\nb \u00e9"


def pieces_of(path: Path) -> list[VocabularyPiece]:
    """Pieces of a published vocabulary, in its plainest form."""
    if path.suffix == ".vocab":
        lines = [line.split("\t") for line in path.read_text().splitlines()]
        pieces = [VocabularyPiece(text.replace("\u2581", " "), float(score)) for text, score in lines]
    else:
        content, place, pieces = path.read_bytes(), 4, []
        while place < len(content):
            score, length = struct.unpack_from("<fi", content, place)
            pieces.append(VocabularyPiece(content[place + 8 : place + 8 + length].decode(), score))
            place += 8 + length
    return [*(VocabularyPiece(text, 0.0) for text in SPECIAL), *pieces[3:]]


@pytest.mark.parametrize(
    ("name", "plain", "vocab_size"),
    [
        ("checkpoints/stories260K/tok512.bin", "checkpoints/stories260K/tok512.bin", 512),
        ("checkpoints/babyllama105/tok105.model", "checkpoints/babyllama105/tok105.vocab", 105),
        ("checkpoints/babyllama105/tok105.vocab", "checkpoints/babyllama105/tok105.vocab", 361),
        ("tokenizers/llama2/tokenizer.bin", "tokenizers/llama2/tokenizer.bin", 32000),
        ("tokenizers/llama2/tokenizer.model", "tokenizers/llama2/tokenizer.bin", 32000),
    ],
)
def test_published_tokenizers(name: str, plain: str, vocab_size: int, shared_data: Path) -> None:
    tokenizer = read_sentencepiece(shared_data / name, vocab_size)
    pieces = pieces_of(shared_data / plain)
    if len(pieces) < vocab_size:
        pieces[3:3] = [VocabularyPiece(text, 0.0) for text in BYTES]
    with lzma.open(shared_data / "tinystories" / "v2_train_head.txt.xz", "rt", encoding="utf-8") as file:
        texts = [story.strip()[:300] for story in file.read(40_000).split("<|endoftext|>")]
    assert len(texts) > 40
    for text in texts + random_texts(10):
        assert tokenizer.encode(text).tolist() == encode_slowly(pieces, text), repr(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-2]), "is damaged or not a .bin tokenizer"),
        (lambda p: p.write_bytes(b""), "is damaged or not a .bin tokenizer"),
        (lambda p: p.write_bytes(b"some text that is no tokenizer"), "is damaged or not a .bin tokenizer"),
        (lambda p: p.unlink(), "cannot be read"),
        (lambda p: write_bin(p, PIECES[:-1]), "entries, the model"),
        (lambda p: write_bin(p, [*PIECES[:-1], PIECES[-2]]), "twice"),
    ],
)
def test_damaged_files(change: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    write_bin(path, PIECES)
    change(path)
    with pytest.raises(UserError) as caught:
        read_sentencepiece(path, len(PIECES))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_kinds(tmp_path: Path) -> None:
    """Unigram models and models that normalise texts are not what this algorithm encodes."""
    path = tmp_path / "t.model"
    write_model(path, PIECES, algorithm=1)
    with pytest.raises(UserError, match="neither byte-pair nor characters"):
        read_sentencepiece(path, len(PIECES))
    write_model(path, PIECES, charsmap=b"map")
    with pytest.raises(UserError, match="normalizes texts"):
        read_sentencepiece(path, len(PIECES))
    write_model(path, PIECES[1:])
    with pytest.raises(UserError, match="its first pieces are not <unk> <s> </s>"):
        read_sentencepiece(path, len(PIECES))
    with pytest.raises(UserError, match=r"of an unknown kind; give a \.bin, \.model, \.vocab file"):
        read_sentencepiece(tmp_path / "t.json", 9)
    with pytest.raises(UserError, match="twice"):
        build_tokenizer([*PIECES, PIECES[-1]])
