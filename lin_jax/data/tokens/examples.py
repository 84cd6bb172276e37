"""Tokens of instruction data, and which of them are targets: those of completions, or of an assistant's messages."""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from lin_jax.data.sources.text import Document
from lin_jax.data.tokenizers.tokenizer import Tokenizer, whole_characters
from lin_jax.data.tokens.pieces import texts_fingerprint
from lin_jax.data.types import Row
from lin_jax.errors import UserError

# Templates that say themselves what the assistant generates.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ExampleTokens:
    """Tokens and loss masks of examples that are tokenized once, on first access: a `TokenSource`.

    Args:
        documents: JSON of the examples, at least one.
        tokenizer: encodes each; it has a chat template, if they are conversations.
    """

    def __init__(self, documents: Sequence[Document], tokenizer: Tokenizer) -> None:
        self.fingerprint = texts_fingerprint(documents)
        self._documents = documents
        self._tokenizer = tokenizer
        self._rows: list[Row | None] = [None] * len(documents)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = self._rows[index]
        if row is None:
            row = self._rows[index] = encode_example(self._documents[index].text, self._tokenizer)
        return dict(row)

    def __repr__(self) -> str:
        return f"ExampleTokens({len(self)})"


def encode_example(text: str, tokenizer: Tokenizer) -> Row:
    """Encodes one example as `tokens` and `loss_mask`, int32 `[N]`, which is 1 where a token is to be learnt.

    Masks are those of TRL's `SFTTrainer`: of a prompt and its completion, the tokens after as many as the prompt has
    by itself, with the end token; of a conversation, what its template writes for the assistant.

    Args:
        text: JSON of `prompt` and `completion`, texts or lists of messages, or of `messages`.
        tokenizer: the model's.

    Raises:
        UserError: the tokenizer has no chat template, or one that fails, or writes a message in another way once
            others follow.
    """
    example = json.loads(text)
    if "messages" in example:
        return _conversation(example["messages"], tokenizer)
    prompt, completion = example["prompt"], example["completion"]
    if isinstance(prompt, str):
        return _completion(prompt, completion, tokenizer)
    before, whole = tokenizer.chat_text(prompt, asks=True), tokenizer.chat_text(prompt + completion)
    return _by_spans(whole, [_span(before, whole, whole)], tokenizer)


def counted(row: Row) -> Row:
    """A row of plain text, all of whose tokens are to be learnt."""
    return {**row, "loss_mask": np.ones_like(row["tokens"])}


def _completion(prompt: str, completion: str, tokenizer: Tokenizer) -> Row:
    own, ids = tokenizer.encode(prompt), tokenizer.encode(prompt + completion)
    if not np.array_equal(ids[: len(own)], own):
        # A token reaches over the seam. The model will be asked with the prompt's own tokens, and is taught with them.
        ids = np.concatenate([own, tokenizer.encode(completion)])
    tokens = tokenizer.marked(ids)
    begin = len(tokenizer.marked(ids, ends=False)) - len(ids)
    return {"tokens": tokens, "loss_mask": (np.arange(len(tokens)) >= begin + len(own)).astype(np.int32)}


def _conversation(messages: list[dict[str, Any]], tokenizer: Tokenizer) -> Row:
    if _GENERATION.search(tokenizer.chat_template):
        ids, mask = tokenizer.chat_tokens(messages)
        return {"tokens": np.asarray(ids, np.int32), "loss_mask": np.asarray(mask, np.int32)}
    whole = tokenizer.chat_text(messages)
    spans = [
        _span(tokenizer.chat_text(messages[:at], asks=True), tokenizer.chat_text(messages[: at + 1]), whole)
        for at, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    return _by_spans(whole, spans, tokenizer)


def _span(before: str, after: str, whole: str) -> tuple[int, int]:
    """First character of a message in the whole text, and the one after its last."""
    if not after.startswith(before) or not whole.startswith(after):
        raise UserError(
            "the tokenizer's chat template writes a message in another way once others follow, so that targets cannot "
            "be told; give a template with {% generation %}, or rows with one answer each"
        )
    return len(before), len(after)


def _by_spans(text: str, spans: Sequence[tuple[int, int]], tokenizer: Tokenizer) -> Row:
    """Tokens of a text; those that begin in one of the spans of characters are to be learnt."""
    encoded = tokenizer.backend.encode(whole_characters(text), add_special_tokens=False)
    begins = np.array([begin for begin, _ in encoded.offsets], np.int64)
    mask = np.zeros(len(begins), bool)
    for begin, end in spans:
        mask |= (begins >= begin) & (begins < end)
    return {"tokens": np.asarray(encoded.ids, np.int32), "loss_mask": mask.astype(np.int32)}
