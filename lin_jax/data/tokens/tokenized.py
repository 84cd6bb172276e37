"""Documents as token sequences for grain: random access in memory, or a stream that can be resumed."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import grain
import numpy as np

from lin_jax.data.sources.tables import readable
from lin_jax.data.sources.text import Document
from lin_jax.data.tokenizers.tokenizer import Tokenizer
from lin_jax.data.tokens.cache import cached_tokens
from lin_jax.data.tokens.examples import encode_example
from lin_jax.data.tokens.pieces import pieces_of, texts_fingerprint, token_dtype
from lin_jax.data.types import TokenSource
from lin_jax.errors import UserError

if TYPE_CHECKING:
    from datasets import IterableDataset


def tokenized(documents: Sequence[Document], tokenizer: Tokenizer, cache: str | None) -> TokenSource:
    """Returns the tokens of documents in memory: tokenized on first access, or kept in a folder from run to run.

    Raises:
        UserError: the folder cannot be used.
    """
    if cache is None:
        return TokenizedDocuments(documents, tokenizer)
    return cached_tokens(cache, documents, tokenizer)


class TokenizedDocuments:
    """Tokens of documents that are tokenized once, on first access.

    A long document comes in pieces, so that shuffling mixes a book with everything else.

    Args:
        documents: the documents, at least one.
        tokenizer: encodes each.
    """

    def __init__(self, documents: Sequence[Document], tokenizer: Tokenizer) -> None:
        self.fingerprint = texts_fingerprint(documents)
        self._documents = documents
        self._tokenizer = tokenizer
        self._pieces = pieces_of(documents)
        self._dtype = token_dtype(tokenizer)
        self._tokens: list[np.ndarray | None] = [None] * len(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        tokens = self._tokens[index]
        if tokens is None:
            piece = self._pieces[index]
            ids = self._tokenizer.encode(piece.text(self._documents))
            tokens = self._tokens[index] = piece.marked(ids, self._tokenizer).astype(self._dtype)
        return {"tokens": tokens.astype(np.int32)}

    def __repr__(self) -> str:
        return f"TokenizedDocuments({len(self)})"


class TokenizedStream(grain.IterDataset):
    """The tokens of a stream of rows `{"text": str}`, over and over, as `{"tokens": int32 [N]}`.

    Args:
        stream: a Hugging Face stream, which keeps its own position.
        tokenizer: encodes each text.
        name: of the source, for messages.
        examples: whether the texts are JSON of examples, which have a `loss_mask` beside their tokens.
    """

    def __init__(self, stream: "IterableDataset", tokenizer: Tokenizer, name: str, *, examples: bool = False) -> None:
        super().__init__()
        self._stream = stream
        self._tokenizer = tokenizer
        self._name = name
        self._examples = examples

    def __iter__(self) -> "_StreamIterator":
        # Streams made from one another share the counters of their position; a copy has its own.
        return _StreamIterator(copy.deepcopy(self._stream.repeat(None)), self._tokenizer, self._name, self._examples)


class _StreamIterator(grain.DatasetIterator):
    """A grain iterator whose state is that of the stream."""

    def __init__(self, stream: "IterableDataset", tokenizer: Tokenizer, name: str, examples: bool) -> None:
        super().__init__()
        self._stream = stream
        self._tokenizer = tokenizer
        self._name = name
        self._examples = examples
        self._rows = iter(stream)

    def __next__(self) -> dict[str, np.ndarray]:
        with readable(self._name):
            row = next(self._rows, None)
        if row is None:
            raise UserError(f"{self._name} has no text to train on; give more, or use fewer shards")
        if self._examples:
            return encode_example(row["text"], self._tokenizer)
        return {"tokens": self._tokenizer.encode_document(row["text"])}

    def get_state(self) -> dict[str, Any]:
        return self._stream.state_dict()

    def set_state(self, state: dict[str, Any]) -> None:
        self._stream.load_state_dict(state)
        self._rows = iter(self._stream)
