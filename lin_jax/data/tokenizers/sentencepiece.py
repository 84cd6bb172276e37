"""Tokenizers of llama2.c and SentencePiece (byte-pair or characters), as fast tokenizers that transformers opens.

A text gets one space in front and is split into characters, unknown ones into bytes; then the neighbouring pair whose
merged piece scores best is merged, the leftmost of equals, until no pair makes a piece. As a BPE: every way to put a
piece together from two others is a merge, and merges rank by the score of what they make.

Three formats are read. llama2.c's `.bin`: int32 longest piece, then for each piece float32 score, int32 length, bytes.
SentencePiece's `.model`: a protocol buffer with pieces, scores and types. Its `.vocab`: a piece and a score a line.
"""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, processors

from lin_jax.data.tokenizers.protobuf import read_fields
from lin_jax.data.tokenizers.tokenizer import Tokenizer
from lin_jax.errors import UserError

SPECIAL = ("<unk>", "<s>", "</s>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
SPACE = "\u2581"
# SentencePiece's numbers of algorithms and of types of pieces.
UNIGRAM, BYTE_PAIR, CHARACTERS = 1, 2, 4


class VocabularyPiece(NamedTuple):
    """An entry of a vocabulary.

    Attributes:
        text: with real spaces.
        score: the best pair is merged first.
    """

    text: str
    score: float


def read_sentencepiece(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """Reads a tokenizer file, for a model with a vocabulary of the given size (None: whatever the file has).

    A file without pieces for bytes, of a model that has 256 entries more, gets them behind its special tokens.

    Raises:
        UserError: there is no such file, it is damaged or of another kind, or it is of another model.
    """
    path = Path(path)
    readers = {".bin": _read_bin, ".model": _read_model, ".vocab": _read_vocab}
    if path.suffix not in readers:
        raise UserError(f"tokenizer {path} is of an unknown kind; give a {', '.join(readers)} file")
    try:
        pieces = readers[path.suffix](path)
    except OSError as error:
        raise UserError(f"tokenizer {path} cannot be read ({error.strerror}); give another file") from error
    except (ValueError, struct.error, LookupError) as error:
        raise UserError(
            f"tokenizer {path} is damaged or not a {path.suffix} tokenizer: {error}; restore the file"
        ) from error
    pieces = [VocabularyPiece(text, 0.0) for text in SPECIAL] + pieces[len(SPECIAL) :]
    if len(pieces) + len(BYTES) == vocab_size and not {piece.text for piece in pieces} & set(BYTES):
        pieces[len(SPECIAL) : len(SPECIAL)] = [VocabularyPiece(text, 0.0) for text in BYTES]
    if vocab_size is not None and len(pieces) != vocab_size:
        raise UserError(
            f"tokenizer {path} has {len(pieces)} entries, the model {vocab_size}; give the model's own tokenizer"
        )
    return build_tokenizer(pieces)


def build_tokenizer(pieces: Sequence[VocabularyPiece]) -> Tokenizer:
    """Builds a tokenizer of pieces in the order of their ids, the first three of them special.

    Raises:
        UserError: two pieces are the same.
    """
    vocabulary = {piece.text: token for token, piece in enumerate(pieces)}
    if len(vocabulary) < len(pieces):
        twice = next(piece.text for token, piece in enumerate(pieces) if vocabulary[piece.text] != token)
        raise UserError(f"the tokenizer has the piece {twice!r} twice; restore the file")
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocabulary, _merges(pieces, vocabulary), unk_token=SPECIAL[0], byte_fallback=set(BYTES) <= set(vocabulary)
        )
    )
    backend.normalizer = normalizers.Prepend(" ")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(list(SPECIAL))
    # Tokens that transformers adds to a text; `Tokenizer.encode` does not add them.
    backend.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[1]} $A",
        pair=f"{SPECIAL[1]} $A {SPECIAL[1]} $B",
        special_tokens=[(SPECIAL[1], 1)],
    )
    return Tokenizer(backend, bos_token=SPECIAL[1], eos_token=SPECIAL[2])


def _merges(pieces: Sequence[VocabularyPiece], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair that merges to a piece, best first.

    Among equal scores, which the leftmost pair wins, a rank cannot tell which is leftmost. Runs of one character
    (spaces, in practice) come out the same if equal halves are merged before all else.
    """
    whole = set(SPECIAL) | set(BYTES)
    known = set(vocabulary) - whole
    ranked: list[tuple[float, bool, int, tuple[str, str]]] = []
    for piece in pieces:
        if piece.text in whole:
            continue
        for cut in range(len(piece.text) - 1, 0, -1):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in known and right in known:
                ranked.append((-piece.score, left != right, len(piece.text), (left, right)))
    return [pair for *_, pair in sorted(ranked, key=lambda each: each[:3])]


def _read_bin(path: Path) -> list[VocabularyPiece]:
    content = path.read_bytes()
    pieces: list[VocabularyPiece] = []
    offset = 4
    while offset < len(content):
        score, length = struct.unpack_from("<fi", content, offset)
        offset += 8
        if length < 0 or offset + length > len(content):
            raise ValueError("it ends within a piece")
        pieces.append(VocabularyPiece(content[offset : offset + length].decode(), score))
        offset += length
    if len(pieces) < len(SPECIAL) or struct.unpack_from("<i", content)[0] <= 0:
        raise ValueError("it has no pieces")
    return pieces


def _read_model(path: Path) -> list[VocabularyPiece]:
    pieces: list[VocabularyPiece] = []
    for number, value in read_fields(path.read_bytes()):
        fields: dict[int, Any] = dict(read_fields(value)) if isinstance(value, bytes) and number in (1, 2, 3) else {}
        if number == 1:
            score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
            pieces.append(VocabularyPiece(fields[1].decode().replace(SPACE, " "), score))
        elif number == 2 and fields.get(3, UNIGRAM) not in (BYTE_PAIR, CHARACTERS):
            raise ValueError("its algorithm is neither byte-pair nor characters")
        elif number == 3 and fields.get(2):
            raise ValueError(f"it normalizes texts ({fields.get(1, b'').decode()}), which is not supported")
    _check_special(pieces)
    return pieces


def _read_vocab(path: Path) -> list[VocabularyPiece]:
    pieces = []
    # Not splitlines(): a piece may be one of the characters that it takes for the end of a line.
    for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n"):
        text, tab, score = line.rpartition("\t")
        if not tab:
            raise ValueError("a line has no tab between piece and score")
        pieces.append(VocabularyPiece(text.replace(SPACE, " "), float(score)))
    _check_special(pieces)
    return pieces


def _check_special(pieces: Sequence[VocabularyPiece]) -> None:
    if tuple(piece.text for piece in pieces[: len(SPECIAL)]) != SPECIAL:
        raise ValueError(f"its first pieces are not {' '.join(SPECIAL)}")
