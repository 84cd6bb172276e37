"""Held-out documents: chosen by a hash of their text, so that a resumed or repeated run holds out the same ones."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

from lin_jax.data.sources.text import Document
from lin_jax.errors import UserError

if TYPE_CHECKING:
    from datasets import IterableDataset


@overload
def split_documents(
    documents: Sequence[Document], validation_fraction: float
) -> tuple[tuple[Document, ...], tuple[Document, ...]]: ...


@overload
def split_documents(
    documents: "IterableDataset", validation_fraction: float
) -> tuple["IterableDataset", "IterableDataset"]: ...


def split_documents(documents: Any, validation_fraction: float) -> tuple[Any, Any]:
    """Splits documents, or a stream of rows `{"text": str}`, into training and validation documents.

    The side depends on the text alone: equal texts go to the same side, and adding documents moves no
    other. About `validation_fraction` of the distinct texts are held out. In memory neither side is
    left empty: of two or more texts at least one goes to each, and a single text loses its tail to
    validation. A stream is split on the fly, so that a short one may leave a side empty.

    Raises:
        UserError: there is a single document and it is too short to be split.
    """
    if not isinstance(documents, Sequence):
        train = documents.filter(lambda row: _position(row["text"]) >= validation_fraction)
        validation = documents.filter(lambda row: _position(row["text"]) < validation_fraction)
        return train, validation
    positions = {document.text: _position(document.text) for document in documents}
    if len(positions) < 2:
        return _cut(documents, validation_fraction)
    # The ends of the order always go to their sides, whatever the fraction.
    lowest, highest = min(positions, key=positions.__getitem__), max(positions, key=positions.__getitem__)
    held_out = {text for text, position in positions.items() if position < validation_fraction}
    held_out = (held_out | {lowest}) - {highest}
    train = tuple(document for document in documents if document.text not in held_out)
    validation = tuple(document for document in documents if document.text in held_out)
    return train, validation


def digest(text: str) -> bytes:
    """Hashes a text to 16 bytes, the same on every machine and in every process."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _position(text: str) -> float:
    """Hashes a text to [0, 1), uniformly for any corpus; Python's own `hash` differs from process to process."""
    return int.from_bytes(digest(text)[:6], "big") / 2**48


def _cut(documents: Sequence[Document], fraction: float) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Splits the tail off the only text there is, after a line break where one is near."""
    if not documents:
        raise UserError("there are no documents to split; give a data source with text in it")
    name, text = documents[0].name, documents[0].text
    if len(text) < 2:
        raise UserError(f"the only document, {name}, is too short to hold part of it out; give more text")
    cut = min(max(round(len(text) * (1 - fraction)), 1), len(text) - 1)
    line_break = text.rfind("\n", cut // 2, cut)
    near = line_break + 1 if line_break > cut - len(text) * fraction else cut
    return (Document(name, text[:near]),), (Document(f"{name}:tail", text[near:]),)
