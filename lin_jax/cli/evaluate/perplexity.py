"""Perplexity on text: in rows as in training, of whole documents, or in a sliding window."""

import argparse
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from lin_jax.cli.measured_text import open_measured_text, read_measured_text
from lin_jax.data import Tokenizer
from lin_jax.data.tokenizers.token_bytes import token_bytes
from lin_jax.decoding.scoring import ContinuationScorer
from lin_jax.errors import UserError
from lin_jax.evaluation.perplexity import Perplexity, evaluate
from lin_jax.losses.cross_entropy import shifted_targets
from lin_jax.progress_bar import progress_bar


def rows_report(options: argparse.Namespace, subject: Any) -> dict[str, Any]:
    """Perplexity in rows of a text, which begin anywhere in it."""
    batches, name = read_measured_text(options, subject.tokenizer, _own_data(subject))
    sizes, count = _token_sizes(subject.tokenizer), 0
    for batch in batches:
        targets = shifted_targets(batch, 1)
        count += int(sizes[np.asarray(targets.ids)[np.asarray(targets.included)]].sum())

    def shown() -> Iterator[dict[str, Any]]:
        with progress_bar(total=len(batches), desc="evaluating", unit="batch") as bar:
            for batch in batches:
                yield batch
                bar.update()

    return _figures(evaluate(subject.model, shown()), count, name, "rows")


def document_report(options: argparse.Namespace, subject: Any) -> dict[str, Any]:
    """Perplexity of each text from its beginning on, with all of it before a token or as much as a window holds."""
    data, corpus = open_measured_text(options, _own_data(subject))
    texts = islice((text for part in corpus.parts for text in part.texts()), options.documents)
    documents = [_with_beginning(subject.tokenizer, subject.tokenizer.encode_document(text)) for text in texts]
    requests = [([each[0]], each[1:]) for each in documents if len(each) > 1]
    if options.context == "sliding":
        length = data.sequence_length
        stride = max(length // 2, 1) if options.stride is None else options.stride
        if stride > length:
            raise UserError(f"--stride is {stride}, more than the window of {length} tokens; give at most that")
        requests = [window for each in documents for window in sliding_windows(each, length, stride)]
    scorer = ContinuationScorer(subject.model, batch_size=options.batch, share=False)
    read = sum(len(context) + len(each) - 1 for context, each in requests)
    with progress_bar(total=read, desc="evaluating", unit="token", unit_scale=True) as bar:
        scores = scorer.score(requests, tokens_done=bar.update)
    loss = -math.fsum(float(np.sum(each.log_probs, dtype=np.float64)) for each in scores)
    tokens = sum(len(each.log_probs) for each in scores)
    sizes = _token_sizes(subject.tokenizer)
    count = sum(int(sizes[np.asarray(each, np.int64)].sum()) for _, each in requests)
    found = Perplexity(loss / tokens if tokens else math.nan, tokens)
    return {**_figures(found, count, data.name, options.context), "documents": len(documents)}


def sliding_windows(tokens: Sequence[int], length: int, stride: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yields context and scored tokens of each window: together at most `length` and the last, which is not read.

    Args:
        tokens: of a text; the first is not scored.
        length: tokens that are read at a time.
        stride: tokens that are scored in each window but the first, which scores all of its own.
    """
    row = [int(token) for token in tokens]
    begin = 1
    while begin < len(row):
        end = min(begin + (length if begin == 1 else stride), len(row))
        first = max(end - 1 - length, 0)
        yield row[first:begin], row[begin:end]
        begin = end


def _own_data(subject: Any) -> Any:
    return subject.source.run.data if subject.source.is_run else None


def _with_beginning(tokenizer: Tokenizer, ids: np.ndarray) -> list[int]:
    """Ids of a document behind a token that begins it, as far as the tokenizer has one: all others are predicted."""
    begins = tokenizer.bos_id is not None and len(ids) and ids[0] == tokenizer.bos_id
    before = [] if begins else [token for token in (tokenizer.bos_id, tokenizer.eos_id) if token is not None][:1]
    return [*before, *ids.tolist()]


def _token_sizes(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text of each token `[V]`; special tokens have none."""
    return np.asarray([len(each) for each in token_bytes(tokenizer)], np.int64)


def _figures(found: Perplexity, count: int, name: str, context: str) -> dict[str, Any]:
    bits = found.loss * found.tokens / math.log(2)
    return {
        "perplexity": found.perplexity,
        "loss": found.loss,
        "bits_per_byte": bits / count if count else math.nan,
        "tokens": found.tokens,
        "bytes": count,
        "context": context,
        "text": name,
    }
