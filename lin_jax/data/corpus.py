"""What a run reads: the documents of one source, or of several that are mixed by weight."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lin_jax.data.config import DataConfig
from lin_jax.data.sources import Document, open_documents
from lin_jax.data.splitting import split_documents

if TYPE_CHECKING:
    from datasets import IterableDataset


@dataclass(frozen=True)
class Part:
    """The documents of one source.

    Attributes:
        name: What they were read from, for messages.
        share: Share of the rows that come from them, above 0; those of all parts add up to 1.
        documents: Documents in memory, or a stream of rows `{"text": str}`.
    """

    name: str
    share: float
    documents: "Sequence[Document] | IterableDataset"

    def texts(self) -> Iterator[str]:
        """All texts, in order."""
        for document in self.documents:
            yield document.text if isinstance(document, Document) else document["text"]


@dataclass(frozen=True)
class Corpus:
    """The parts of a mixture; a single source is a mixture of one."""

    parts: tuple[Part, ...]

    @classmethod
    def open(cls, config: DataConfig) -> "Corpus":
        """Opens all sources of a configuration, in memory or as streams.

        Raises:
            UserError: a source is missing, empty, unreadable, of an unsupported kind, or lacks the column.
        """
        shares = (weight / sum(config.weights) for weight in config.weights)
        return cls(
            tuple(
                Part(part.name, share, open_documents(part)) for part, share in zip(config.parts, shares, strict=True)
            )
        )

    @classmethod
    def of(cls, documents: "Corpus | Sequence[Document] | IterableDataset") -> "Corpus":
        """Documents that need no mixing as a corpus; a corpus is one already."""
        return documents if isinstance(documents, Corpus) else cls((Part("the documents", 1.0, documents),))

    def split(self, validation_fraction: float) -> tuple["Corpus", "Corpus"]:
        """Parts the documents of each source into a training and a validation side, as `split_documents` does.

        A source has text on either side, however small it is; there alone a text that also stands in another source
        may be on both.

        Raises:
            UserError: a source is a single document, too short to be cut.
        """
        sides = [split_documents(part.documents, validation_fraction) for part in self.parts]
        train, validation = (
            tuple(replace(part, documents=each) for part, each in zip(self.parts, side, strict=True))
            for side in zip(*sides, strict=True)
        )
        return Corpus(train), Corpus(validation)
