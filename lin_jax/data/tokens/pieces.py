"""Long documents split into pieces that are tokenized one by one, so that a book is shuffled with everything else."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lin_jax.data.sources.split import digest
from lin_jax.data.sources.text import Document
from lin_jax.data.tokenizers.tokenizer import Tokenizer

# Characters of a document that are tokenized at once: some thousand tokens.
LONGEST_PIECE = 16384
# Names how documents become tokens, so that files kept by other versions are not taken for these: each piece begins as
# a document does.
LAYOUT = f"{LONGEST_PIECE}-begun"


class DocumentPiece(NamedTuple):
    """A piece of a document.

    Attributes:
        document: index of the document.
        begin: index of the first character.
        end: index after the last character.
        last: whether it is the document's last piece.
    """

    document: int
    begin: int
    end: int
    last: bool

    def text(self, documents: Sequence[Document]) -> str:
        """The characters of the piece."""
        return documents[self.document].text[self.begin : self.end]

    def marked(self, ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
        """Adds a document's beginning to the ids of each piece, and its end to those of the last.

        Pieces are shuffled and see nothing of one another. Without the token that a prompt begins with, a model would
        hardly meet it in a book.
        """
        return tokenizer.marked(ids, ends=self.last)


def pieces_of(documents: Sequence[Document]) -> list[DocumentPiece]:
    """Splits documents into pieces, in order."""
    return [
        DocumentPiece(number, begin, end, end == len(each.text))
        for number, each in enumerate(documents)
        for begin, end in _spans(each.text)
    ]


def texts_fingerprint(documents: Sequence[Document]) -> str:
    """Digest of all texts in their order."""
    texts = hashlib.blake2b(digest_size=8)
    for document in documents:
        texts.update(digest(document.text))
    return texts.hexdigest()


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Type that ids are stored in: two bytes hold every vocabulary up to 65,536, and are less than the text itself."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<i4")


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """Yields begin and end of pieces of at most LONGEST_PIECE characters, split after a line if there is one."""
    begin = 0
    while len(text) - begin > LONGEST_PIECE:
        line_break = text.rfind("\n", begin + LONGEST_PIECE // 2, begin + LONGEST_PIECE)
        end = line_break + 1 if line_break >= 0 else begin + LONGEST_PIECE
        yield begin, end
        begin = end
    yield begin, len(text)
