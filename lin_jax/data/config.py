"""What to train on: where the text is, how it becomes tokens, and what is held out."""

from dataclasses import dataclass, replace

from lin_jax.data.glue import glue_task
from lin_jax.data.mixture import PART_FIELDS, MixturePart
from lin_jax.errors import UserError

PYTHON_STDLIB = "python-stdlib"
HUB_PREFIX = "hub:"

# A byte-level vocabulary holds every byte and the end-of-text token, before any merge.
SMALLEST_BPE = 257


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it is cut into sequences.

    In a folder, `.jsonl`, `.parquet` and `.arrow` files are tables with one document a row; any other
    UTF-8 file is one document. A `.json` or `.csv` file is a table when it is named itself. Files
    compressed with gzip or xz (`.gz`, `.xz`) are read like the files inside.

    Attributes:
        source: The text: "python-stdlib" (the sources of this Python's standard library), the path of a
            file or folder, "hub:OWNER/NAME" (a data set on the Hugging Face hub), or a list of paths.
        task: A task of GLUE to read from the source in place of text: cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte or
            wnli. The source is then a folder of GLUE's own files, or "hub:nyu-mll/glue".
        subset: Configuration name of a hub data set, such as "wikitext-2-raw-v1".
        split: Split of a hub data set.
        text_field: Column that holds the text, in tables and hub data sets.
        mixture: Several sources in place of one, each with a weight: its share of the rows.
        streaming: Read tables or a hub data set as a stream, never whole in memory.
        tokenizer: Folder or tokenizer.json file of a tokenizer, or "hub:OWNER/NAME"; by default a
            byte-level BPE is trained on the text.
        vocab_size: Vocabulary size of a trained tokenizer; at least 257.
        sequence_length: Tokens that a model reads at once; rows of text hold one more, for the last target, and rows of
            a task no more than its longest example.
        validation_fraction: Share of the documents held out, above 0 and below 1.
        validation_batches: Batches of held-out text to validate on, at most.
        document_separator: Marker between documents inside a text file, such as "<|endoftext|>"; by
            default a file is one document.
        max_bytes: Stop reading a source after this many bytes of text (UTF-8); by default read all.
        shards: How many parts the documents are dealt to, each of which gives the same number of rows to every
            batch; must divide the batch size. A process reads only the shards that its rows come from, so that at
            least as many as there will ever be processes make reading scale; the batches do not depend on processes.
        cache: Folder in which to keep tokens of documents in memory from run to run, such as
            "~/.cache/lin_jax/tokens"; by default they are tokenised anew, as they are needed.
        separate_documents: Whether rows say which document each token belongs to, so that attention and targets stop
            at their borders; otherwise a row is one text from its first token to its last.

    Raises:
        UserError: a value is out of range, or two options contradict each other.
    """

    source: str | tuple[str, ...] = PYTHON_STDLIB
    task: str | None = None
    subset: str | None = None
    split: str = "train"
    text_field: str = "text"
    mixture: tuple[MixturePart, ...] = ()
    streaming: bool = False
    tokenizer: str | None = None
    vocab_size: int = 2048
    sequence_length: int = 256
    validation_fraction: float = 0.05
    validation_batches: int = 16
    document_separator: str | None = None
    max_bytes: int | None = None
    shards: int = 1
    cache: str | None = None
    separate_documents: bool = True

    def __post_init__(self) -> None:
        """Checks every value before anything is read."""
        if self.mixture:
            self._check_mixture()
        else:
            self._check_source()
        if self.task is not None:
            glue_task(self.task)
        if self.vocab_size < SMALLEST_BPE:
            raise UserError(
                f"vocab_size {self.vocab_size} is too small: a byte-level vocabulary needs {SMALLEST_BPE} or more"
            )
        for name in ("sequence_length", "validation_batches", "shards"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} must be 1 or more")
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction {self.validation_fraction} must lie between 0 and 1, such as 0.05")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise UserError(f"max_bytes {self.max_bytes} must be 1 or more, or null to read everything")
        if self.document_separator is not None and not self.document_separator.strip():
            raise UserError(
                f"document_separator {self.document_separator!r} is blank: give a marker such as "
                "'<|endoftext|>', or null to keep each file one document"
            )
        if self.cache is not None and not self.cache.strip():
            raise UserError("cache is blank: give a folder, such as ~/.cache/lin_jax/tokens, or null to keep no tokens")

    def _check_source(self) -> None:
        if not self.sources or any(source.strip() in ("", HUB_PREFIX) for source in self.sources):
            raise UserError(
                f"data source {self.source!r} is empty: give '{PYTHON_STDLIB}', a path, or 'hub:OWNER/NAME'"
            )
        if self.task is not None and (self.source == PYTHON_STDLIB or len(self.sources) > 1):
            raise UserError(
                f"data.task {self.task!r} needs data.source: one folder with GLUE's files, or {HUB_PREFIX}nyu-mll/glue"
            )
        if len(self.sources) > 1 and any(each == PYTHON_STDLIB or _on_hub(each) for each in self.sources):
            raise UserError(f"data source {list(self.sources)} mixes kinds: a list may name files and folders only")
        if self.subset is not None and not self.is_hub:
            raise UserError(
                f"subset {self.subset!r} is for hub data sets, and the source is {self.source!r}: "
                "leave subset out, or give a source 'hub:OWNER/NAME'"
            )
        if self.streaming and self.source == PYTHON_STDLIB:
            raise UserError(f"source '{PYTHON_STDLIB}' cannot be streamed: leave streaming off")
        if self.streaming and self.max_bytes is not None:
            raise UserError(f"max_bytes {self.max_bytes} does not apply to a stream: leave one of them out")
        if self.streaming and self.cache is not None:
            raise UserError(f"cache {self.cache!r} does not apply to a stream: leave one of them out")

    def _check_mixture(self) -> None:
        for name in PART_FIELDS:
            value = getattr(self, name)
            if value != getattr(DataConfig, name):
                raise UserError(f"{name} {value!r} does not go with a mixture: give {name} in the parts of the mixture")
        # Each part is checked as the configuration that it is.
        assert self.parts

    def rows_per_shard(self, batch_size: int) -> int:
        """How many rows of every batch each shard gives.

        Raises:
            UserError: the shards do not divide the batch.
        """
        if batch_size % self.shards:
            raise UserError(
                f"batch_size {batch_size} is not a multiple of data.shards {self.shards}: change one of them"
            )
        return batch_size // self.shards

    @property
    def parts(self) -> tuple["DataConfig", ...]:
        """The parts of the mixture as configurations of their own; of a single source, itself."""
        if not self.mixture:
            return (self,)
        return tuple(
            replace(self, mixture=(), **{name: getattr(part, name) for name in PART_FIELDS}) for part in self.mixture
        )

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each of the parts."""
        return tuple(part.weight for part in self.mixture) or (1.0,)

    @property
    def name(self) -> str:
        """The source, or all of them, for messages."""
        return ", ".join(source for part in self.parts for source in part.sources)

    @property
    def sources(self) -> tuple[str, ...]:
        """The source, or all of them in order."""
        return (self.source,) if isinstance(self.source, str) else tuple(self.source)

    @property
    def is_hub(self) -> bool:
        """Whether a source is on the Hugging Face hub, so that reading it needs the network."""
        return any(_on_hub(source) for part in self.parts for source in part.sources)


def _on_hub(source: str) -> bool:
    return source.startswith(HUB_PREFIX)
