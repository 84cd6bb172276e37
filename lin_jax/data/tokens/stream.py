"""A stream of documents as token sequences for grain, which can be resumed."""

import copy
from typing import TYPE_CHECKING, Any

import grain
import numpy as np

from lin_jax.data.sources.tables import readable
from lin_jax.data.tokenizers.tokenizer import Tokenizer
from lin_jax.data.tokens.examples import encode_example
from lin_jax.errors import UserError

if TYPE_CHECKING:
    from datasets import IterableDataset


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
