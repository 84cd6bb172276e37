"""Vocabularies in files, for tests of several rooms."""

from collections.abc import Sequence
from pathlib import Path

from lin_jax.data.tokenizers.sentencepiece import VocabularyPiece


def write_vocab(path: Path, pieces: Sequence[VocabularyPiece]) -> None:
    """Pieces and scores as SentencePiece lists them."""
    path.write_text("".join(f"{piece.text.replace(' ', chr(0x2581))}\t{piece.score:g}\n" for piece in pieces))
