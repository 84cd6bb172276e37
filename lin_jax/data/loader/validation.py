"""Fixed validation batches from held-out documents."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lin_jax.data.config import TEXT, DataConfig
from lin_jax.data.sources.corpus import Corpus, CorpusPart
from lin_jax.data.sources.split import digest
from lin_jax.data.sources.text import Document
from lin_jax.data.tokenizers.tokenizer import Tokenizer
from lin_jax.data.tokens.examples import counted, encode_example
from lin_jax.data.types import HostBatch, Row
from lin_jax.errors import UserError

if TYPE_CHECKING:
    from datasets import IterableDataset


def validation_batches(
    documents: "Corpus | Sequence[Document] | IterableDataset",
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    batch_size: int,
) -> list[HostBatch]:
    """Returns at most `config.validation_batches` fixed batches of held-out text, all of full size.

    Each part of a mixture gives its share of the tokens, or as many as it has. Documents in memory are
    taken in an order that mixes names; a stream is taken from its start. The last row, and rows missing
    from the last batch, are filled with tokens 0 and segment_ids 0; where `separate_documents` is false,
    such a batch is left out.

    Raises:
        UserError: there is no held-out text, or without separate documents not enough for a batch.
    """
    length = config.sequence_length + 1
    wanted = config.validation_batches * batch_size * length
    found = [piece for part in Corpus.of(documents).parts for piece in _beginning(part, tokenizer, wanted)]
    pieces = [piece["tokens"] for piece in found]
    tokens = np.concatenate([np.zeros(0, np.int32), *pieces])[:wanted]
    columns = {"tokens": tokens}
    if config.has_loss_mask:
        columns["loss_mask"] = np.concatenate([np.zeros(0, np.int32), *(each["loss_mask"] for each in found)])[:wanted]
    if not tokens.size:
        raise UserError(
            f"no text is held out; raise validation_fraction {config.validation_fraction}, or give more documents"
        )
    if not config.separate_documents:
        return _whole_batches(columns, length, batch_size)
    owned = np.repeat(np.arange(1, len(pieces) + 1), [len(piece) for piece in pieces])[:wanted]
    padding = np.zeros(-tokens.size % (batch_size * length), np.int32)
    rows = {name: np.concatenate([column, padding]).reshape(-1, length) for name, column in columns.items()}
    owners = np.concatenate([owned, padding]).reshape(-1, length)
    numbers = np.where(owners > 0, owners - owners[:, :1] + 1, 0).astype(np.int32)
    rows["segment_ids"] = numbers
    return [
        {name: part[start : start + batch_size] for name, part in rows.items()}
        for start in range(0, len(numbers), batch_size)
    ]


def _beginning(part: CorpusPart, tokenizer: Tokenizer, wanted: int) -> Iterator[Row]:
    """Yields tokens of a part's documents, and which count, until they make up its share of the wanted ones."""
    left = max(1, round(part.share * wanted))
    for text in _texts(part):
        if part.format == TEXT:
            whole = counted({"tokens": tokenizer.encode_document(text)})
        else:
            whole = encode_example(text, tokenizer)
        piece = {name: column[:left] for name, column in whole.items()}
        left -= len(piece["tokens"])
        yield piece
        if not left:
            return


def _texts(part: CorpusPart) -> Iterator[str]:
    texts = part.texts()
    return iter(sorted(texts, key=digest)) if isinstance(part.documents, Sequence) else texts


def _whole_batches(columns: Row, length: int, batch_size: int) -> list[HostBatch]:
    tokens = columns["tokens"]
    count = tokens.size // (batch_size * length)
    if not count:
        raise UserError(
            f"{tokens.size} tokens of held-out text are less than one batch of {batch_size} rows of {length}; raise "
            "validation_fraction, or set separate_documents to true, which fills the batch up"
        )
    rows = {
        name: column[: count * batch_size * length].reshape(count, batch_size, length)
        for name, column in columns.items()
    }
    return [{name: part[number] for name, part in rows.items()} for number in range(count)]
