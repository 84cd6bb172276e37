"""The documents of a run: of one source, or of several that are mixed by weight."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lin_jax.data.config import TEXT, DataConfig
from lin_jax.data.sources.split import split_documents
from lin_jax.data.sources.text import Document, open_documents
from lin_jax.errors import UserError

if TYPE_CHECKING:
    from datasets import IterableDataset


@dataclass(frozen=True)
class CorpusPart:
    """The documents of one source.

    Attributes:
        name: of the source, for messages.
        share: share of the rows that come from them, above 0; those of all parts add up to 1.
        documents: documents in memory, or a stream of rows `{"text": str}`.
        format: of the rows that they come from; of another than text, a document is an example as JSON.
    """

    name: str
    share: float
    documents: "Sequence[Document] | IterableDataset"
    format: str = TEXT

    def texts(self) -> Iterator[str]:
        """Yields all texts, in order."""
        for document in self.documents:
            yield document.text if isinstance(document, Document) else document["text"]


@dataclass(frozen=True)
class Corpus:
    """The parts of a mixture; a single source is a mixture of one part.

    Attributes:
        parts: the documents of each source.
    """

    parts: tuple[CorpusPart, ...]

    @classmethod
    def open(cls, config: DataConfig) -> "Corpus":
        """Opens all sources of a configuration, in memory or as streams.

        Raises:
            UserError: a source is missing, empty, unreadable, of an unsupported kind, or lacks the column.
        """
        shares = (weight / sum(config.weights) for weight in config.weights)
        return cls(
            tuple(
                CorpusPart(part.name, share, open_documents(part), part.format)
                for part, share in zip(config.parts, shares, strict=True)
            )
        )

    @classmethod
    def of(cls, documents: "Corpus | Sequence[Document] | IterableDataset") -> "Corpus":
        """Wraps documents of a single source as a corpus; returns a corpus as it is."""
        return documents if isinstance(documents, Corpus) else cls((CorpusPart("the documents", 1.0, documents),))

    def split(self, validation_fraction: float) -> tuple["Corpus", "Corpus"]:
        """Splits the documents of each source into training and validation documents, as `split_documents` does.

        Every source has text in both, however small it is; therefore a text that also stands in another source may be
        in both.

        Raises:
            UserError: a source is a single document, too short to be split, or a single example.
        """
        for part in self.parts:
            if part.format != TEXT and isinstance(part.documents, Sequence) and len(part.documents) < 2:
                raise UserError(f"{part.name} has a single example, and none to hold out; give more")
        sides = [split_documents(part.documents, validation_fraction) for part in self.parts]
        train, validation = (
            tuple(replace(part, documents=each) for part, each in zip(self.parts, side, strict=True))
            for side in zip(*sides, strict=True)
        )
        return Corpus(train), Corpus(validation)
