"""Documents cut into pieces that are tokenised one by one, so that a book is shuffled with everything else."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lin_jax.data.sources import Document
from lin_jax.data.splitting import digest
from lin_jax.data.tokenizer import Tokenizer

# Characters of a document that are read in one go: some thousand tokens.
LONGEST_PIECE = 16384


class Piece(NamedTuple):
    """A part of a document: which one, the characters from `begin` to before `end`, and whether it is the last."""

    document: int
    begin: int
    end: int
    last: bool

    def text(self, documents: Sequence[Document]) -> str:
        """The characters themselves."""
        return documents[self.document].text[self.begin : self.end]

    def marked(self, ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
        """Its ids with the marks of the document, which stand at its own ends only."""
        return tokenizer.marked(ids, begins=self.begin == 0, ends=self.last)


def pieces_of(documents: Sequence[Document]) -> list[Piece]:
    """All pieces of all documents, in order."""
    return [
        Piece(number, begin, end, end == len(each.text))
        for number, each in enumerate(documents)
        for begin, end in _spans(each.text)
    ]


def fingerprint(documents: Sequence[Document]) -> str:
    """Stands for all texts in their order."""
    texts = hashlib.blake2b(digest_size=8)
    for document in documents:
        texts.update(digest(document.text))
    return texts.hexdigest()


def narrow(tokenizer: Tokenizer) -> np.dtype:
    """The type to keep ids in: two bytes hold every vocabulary up to 65,536, and are less than the text itself."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<i4")


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """Where pieces begin and end: of LONGEST_PIECE characters at the most, cut after a line if there is one."""
    begin = 0
    while len(text) - begin > LONGEST_PIECE:
        line_break = text.rfind("\n", begin + LONGEST_PIECE // 2, begin + LONGEST_PIECE)
        end = line_break + 1 if line_break >= 0 else begin + LONGEST_PIECE
        yield begin, end
        begin = end
    yield begin, len(text)
