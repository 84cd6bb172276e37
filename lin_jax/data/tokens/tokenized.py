"""Documents in memory as token sequences, by index."""

from collections.abc import Sequence

import numpy as np

from lin_jax.data.sources.text import Document
from lin_jax.data.tokenizers.tokenizer import Tokenizer
from lin_jax.data.tokens.cache import cached_tokens
from lin_jax.data.tokens.pieces import pieces_of, texts_fingerprint, token_dtype
from lin_jax.data.types import TokenSource


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
