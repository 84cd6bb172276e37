"""Documents as token sequences for grain: random access in memory, or a stream that knows its place."""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import grain
import numpy as np

from lin_jax.data.sources import Document
from lin_jax.data.splitting import digest
from lin_jax.data.tables import readable
from lin_jax.data.tokenizer import Tokenizer
from lin_jax.errors import UserError

if TYPE_CHECKING:
    from datasets import IterableDataset


# Characters of a document that are read in one go: some thousand tokens.
LONGEST_PIECE = 16384


class Piece(NamedTuple):
    """A part of a document: which one, and the characters from `begin` to before `end`."""

    document: int
    begin: int
    end: int


class TokenizedDocuments:
    """Random access to the tokens of documents, `{"tokens": int32 [N]}`; each is tokenised once, when first asked for.

    A long document comes in pieces, so that shuffling mixes a book with everything else.

    Args:
        documents: The documents, at least one.
        tokenizer: Turns each into ids.
    """

    def __init__(self, documents: Sequence[Document], tokenizer: Tokenizer):
        self._documents = documents
        self._tokenizer = tokenizer
        self._pieces = [
            Piece(number, begin, end) for number, each in enumerate(documents) for begin, end in spans(each.text)
        ]
        # Two bytes a token hold every vocabulary up to 65,536: a corpus in memory is then smaller than its text.
        self._dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
        self._cache: list[np.ndarray | None] = [None] * len(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        tokens = self._cache[index]
        if tokens is None:
            tokens = self._cache[index] = self._encoded(self._pieces[index]).astype(self._dtype)
        return {"tokens": tokens.astype(np.int32)}

    def _encoded(self, piece: Piece) -> np.ndarray:
        """The tokens of a piece; the marks of a document stand at its own ends only."""
        text = self._documents[piece.document].text
        tokens = self._tokenizer.encode_document(text[piece.begin : piece.end])
        whole = len(self._tokenizer.encode_document(""))
        after = int(self._tokenizer.eos_id is not None)
        before = whole - after
        return tokens[before * (piece.begin > 0) : len(tokens) - after * (piece.end < len(text))]

    def __repr__(self) -> str:
        return f"TokenizedDocuments({len(self)})"

    def fingerprint(self) -> str:
        """Stands for all texts in their order."""
        texts = hashlib.blake2b(digest_size=8)
        for document in self._documents:
            texts.update(digest(document.text))
        return texts.hexdigest()


def spans(text: str, longest: int = LONGEST_PIECE) -> Iterator[tuple[int, int]]:
    """Where pieces of a text begin and end: of `longest` characters at the most, cut after a line if there is one."""
    begin = 0
    while len(text) - begin > longest:
        line_break = text.rfind("\n", begin + longest // 2, begin + longest)
        end = line_break + 1 if line_break >= 0 else begin + longest
        yield begin, end
        begin = end
    yield begin, len(text)


class TokenizedStream(grain.IterDataset):
    """The tokens of a stream of rows `{"text": str}`, over and over, as `{"tokens": int32 [N]}`.

    Args:
        stream: A Hugging Face stream; its own state says where it stands.
        tokenizer: Turns each text into ids.
    """

    def __init__(self, stream: "IterableDataset", tokenizer: Tokenizer):
        super().__init__()
        self._stream = stream
        self._tokenizer = tokenizer

    def __iter__(self) -> "_StreamIterator":
        # Streams made from one another share the counters that say where they stand; a copy has its own.
        return _StreamIterator(copy.deepcopy(self._stream.repeat(None)), self._tokenizer)


class _StreamIterator(grain.DatasetIterator):
    """A grain iterator whose state is the stream's own."""

    def __init__(self, stream: "IterableDataset", tokenizer: Tokenizer):
        super().__init__()
        self._stream = stream
        self._tokenizer = tokenizer
        self._rows = iter(stream)

    def __next__(self) -> dict[str, np.ndarray]:
        with readable("the streamed data set"):
            row = next(self._rows, None)
        if row is None:
            raise UserError("the streamed data set has no text to train on: give a larger one")
        return {"tokens": self._tokenizer.encode_document(row["text"])}

    def get_state(self) -> dict[str, Any]:
        return self._stream.state_dict()

    def set_state(self, state: dict[str, Any]) -> None:
        self._stream.load_state_dict(state)
        self._rows = iter(self._stream)
