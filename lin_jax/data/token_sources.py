"""Documents as token sequences for grain: random access in memory, or a stream that knows its place."""

import copy
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import grain
import numpy as np

from lin_jax.data.sources import Document
from lin_jax.data.splitting import digest
from lin_jax.data.tables import readable
from lin_jax.data.tokenizer import Tokenizer
from lin_jax.errors import UserError

if TYPE_CHECKING:
    from datasets import IterableDataset


class TokenizedDocuments:
    """Random access to the tokens of documents, `{"tokens": int32 [N]}`; each is tokenised once, when first asked for.

    Args:
        documents: The documents, at least one.
        tokenizer: Turns each into ids.
    """

    def __init__(self, documents: Sequence[Document], tokenizer: Tokenizer):
        self._documents = documents
        self._tokenizer = tokenizer
        # Two bytes a token hold every vocabulary up to 65,536: a corpus in memory is then smaller than its text.
        self._dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
        self._cache: list[np.ndarray | None] = [None] * len(documents)

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        tokens = self._cache[index]
        if tokens is None:
            tokens = self._tokenizer.encode_document(self._documents[index].text).astype(self._dtype)
            self._cache[index] = tokens
        return {"tokens": tokens.astype(np.int32)}

    def __repr__(self) -> str:
        return f"TokenizedDocuments({len(self)})"

    def fingerprint(self) -> str:
        """Stands for all texts in their order."""
        texts = hashlib.blake2b(digest_size=8)
        for document in self._documents:
            texts.update(digest(document.text))
        return texts.hexdigest()


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
