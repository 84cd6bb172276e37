"""Configuration of the data: where the text is, how it becomes tokens, and how much is held out."""

import math
from dataclasses import dataclass, replace

from lin_jax.data.glue.tasks import glue_task
from lin_jax.data.sources.remote import HUB_PREFIX, RemoteName, is_remote
from lin_jax.data.tokenizers.tokenizer import SMALLEST_BPE
from lin_jax.errors import UserError

PYTHON_STDLIB = "python-stdlib"
# The value of `document_separator` that has text files cut at <|endoftext|> where they hold it.
AUTO = "auto"
# Formats of rows: a text, a prompt with its completion, or the messages of a conversation.
TEXT, PROMPT_COMPLETION, MESSAGES = "text", "prompt_completion", "messages"
FORMATS = (TEXT, PROMPT_COMPLETION, MESSAGES)


@dataclass(frozen=True)
class MixturePart:
    """One source of a mixture; its fields mean the same as in `DataConfig`.

    Attributes:
        source: the text: "python-stdlib", the path of a file or folder, "hub:OWNER/NAME", "hub:OWNER/NAME/FILE",
            "https://HOST/FILE", or a list of files and folders.
        weight: share of the rows, relative to the other parts; weights need not add up to one.
        subset: configuration name of a hub data set.
        split: split of a hub data set.
        text_field: column that holds the text, in tables and hub data sets.
        document_separator: marker between documents inside a text file, "auto", or None for a document a file.
        format: of the rows: text, prompt_completion or messages.

    Raises:
        UserError: the weight is not a positive number.
    """

    source: str | tuple[str, ...]
    weight: float = 1.0
    subset: str | None = None
    split: str = "train"
    text_field: str = "text"
    document_separator: str | None = AUTO
    format: str = TEXT

    def __post_init__(self) -> None:
        """Checks the weight; the other fields are checked by the `DataConfig` made of each part."""
        if not 0 < self.weight < math.inf:
            raise UserError(
                f"weight {self.weight} of data source {self.source!r} is not finite and positive; give one such as 1"
            )


# Fields that a mixture has in each of its parts, and not beside them.
PART_FIELDS = ("source", "subset", "split", "text_field", "document_separator", "format")


@dataclass(frozen=True)
class DataConfig:
    """The text, how it is tokenized and packed into rows, and how much of it is held out.

    In a folder, `.jsonl`, `.ndjson`, `.parquet` and `.arrow` files are tables with one document a row; any
    other UTF-8 file is one document. A `.json`, `.csv` or `.tsv` file is a table when it is named itself.
    Compressed files (`.gz`, `.xz`, `.bz2`, `.zst`) are read like the files inside; case does not matter.

    Attributes:
        source: the text: "python-stdlib" (the sources of this Python's standard library), the path of a
            file or folder, "hub:OWNER/NAME" (a data set on the Hugging Face Hub), "hub:OWNER/NAME/FILE" (one file of
            it) or "https://HOST/FILE", which are fetched once, or a list of files and folders.
        task: a task of GLUE to read from the source in place of text: cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte or
            wnli. The source is then a folder of GLUE's own files, or "hub:nyu-mll/glue".
        subset: configuration name of a hub data set, such as "wikitext-2-raw-v1".
        split: split of a hub data set.
        text_field: column that holds the text, in tables and hub data sets.
        mixture: several sources in place of one, each with a weight: its share of the rows.
        streaming: read tables or a hub data set as a stream, never whole in memory.
        tokenizer: folder or tokenizer.json file of a tokenizer, "hub:OWNER/NAME" or "hub:OWNER/NAME/FILE"; None trains
            a byte-level BPE on the text.
        vocab_size: vocabulary size of a trained tokenizer; at least 257.
        sequence_length: tokens that a model reads at once; rows of text hold one more, for the last target, and rows of
            a task no more than its longest example.
        validation_fraction: share of the documents held out, above 0 and below 1.
        validation_batches: batches of held-out text to validate on, at most.
        document_separator: marker between documents inside a text file; "auto" takes "<|endoftext|>" for one in files
            that hold it, but for places where it stands in quotes, and says so; None makes a file one document.
        max_bytes: bytes of text (UTF-8) after which reading a source stops; of a remote file of text only so many are
            fetched, up to the last line break. None reads all.
        shards: number of shards that the documents are distributed over, each of which gives the same number of rows
            to every batch; must divide the batch size. A process reads only the shards that its rows come from, so that
            reading scales up to as many processes as there are shards; the batches do not depend on processes.
        cache: folder in which tokens of documents in memory are kept from run to run, such as
            "~/.cache/lin_jax/tokens"; None tokenizes them in every run, as they are needed.
        separate_documents: whether rows tell which document each token belongs to, so that attention and targets stop
            at document boundaries; otherwise a row is one text from its first token to its last.
        format: of a table's rows: text (the column `text_field`), prompt_completion (columns `prompt` and `completion`,
            texts or lists of messages), or messages (a column of that name, written by the tokenizer's chat template).
            In the last two, only the tokens of completions, or of the assistant, are targets.

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
    document_separator: str | None = AUTO
    max_bytes: int | None = None
    shards: int = 1
    cache: str | None = None
    separate_documents: bool = True
    format: str = TEXT

    def __post_init__(self) -> None:
        """Checks every value before anything is read."""
        if self.mixture:
            self._check_mixture()
        else:
            self._check_source()
        if self.task is not None:
            glue_task(self.task)
        if self.format not in FORMATS:
            raise UserError(f"format {self.format!r} is unknown; choose one of {', '.join(FORMATS)}")
        if self.has_loss_mask:
            self._check_examples()
        if self.vocab_size < SMALLEST_BPE:
            raise UserError(
                f"vocab_size {self.vocab_size} is too small for a byte-level vocabulary; give {SMALLEST_BPE} or more"
            )
        for name in ("sequence_length", "validation_batches", "shards"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} is too small; give 1 or more")
        if not 0 < self.validation_fraction < 1:
            raise UserError(
                f"validation_fraction {self.validation_fraction} is not between 0 and 1; give one such as 0.05"
            )
        if self.max_bytes is not None and self.max_bytes < 1:
            raise UserError(f"max_bytes {self.max_bytes} is too small; give 1 or more, or null to read everything")
        if self.document_separator is not None and not self.document_separator.strip():
            raise UserError(
                f"document_separator {self.document_separator!r} is blank; give a marker such as "
                "'<|endoftext|>', 'auto' to have that one found, or null to keep each file one document"
            )
        if self.cache is not None and not self.cache.strip():
            raise UserError("cache is blank; give a folder, such as ~/.cache/lin_jax/tokens, or null to keep no tokens")

    def _check_source(self) -> None:
        if not self.sources or any(source.strip() in ("", HUB_PREFIX) for source in self.sources):
            raise UserError(
                f"data source {self.source!r} is empty; give '{PYTHON_STDLIB}', a path, or 'hub:OWNER/NAME'"
            )
        if self.task is not None and (self.source == PYTHON_STDLIB or len(self.sources) > 1):
            raise UserError(
                f"data.task {self.task!r} needs data.source; give one folder with GLUE's files, or "
                f"{HUB_PREFIX}nyu-mll/glue"
            )
        for remote in filter(is_remote, self.sources):
            RemoteName.parse(remote)
        if len(self.sources) > 1 and any(each == PYTHON_STDLIB or is_data_set(each) for each in self.sources):
            raise UserError(f"data source {list(self.sources)} mixes kinds; give files and folders only in a list")
        if self.subset is not None and not self.is_hub:
            raise UserError(
                f"subset {self.subset!r} is for hub data sets, and the source is {self.source!r}; "
                "leave subset out (--data.subset null), or give a source 'hub:OWNER/NAME'"
            )
        if self.streaming and self.source == PYTHON_STDLIB:
            raise UserError(f"source '{PYTHON_STDLIB}' cannot be streamed; leave streaming off")
        if self.streaming and self.max_bytes is not None:
            raise UserError(f"max_bytes {self.max_bytes} does not apply to a stream; leave one of them out")
        if self.streaming and self.cache is not None:
            raise UserError(f"cache {self.cache!r} does not apply to a stream; leave one of them out")

    def _check_examples(self) -> None:
        """Refuses what is for texts alone."""
        named = next(part.format for part in self.parts if part.format != TEXT)
        if self.cache is not None:
            raise UserError(f"cache {self.cache!r} is for format text, and not for {named}; leave it out")
        if any(part.format != TEXT and part.source == PYTHON_STDLIB for part in self.parts):
            raise UserError(f"format {named} needs a table with such rows; give a source")
        if self.task is not None:
            raise UserError(f"format {named} is for text, and data.task {self.task} for examples of GLUE; give one")

    def _check_mixture(self) -> None:
        for name in PART_FIELDS:
            value = getattr(self, name)
            if value != getattr(DataConfig, name):
                raise UserError(f"{name} {value!r} does not go with a mixture; give {name} in the parts of the mixture")
        # Each part is checked as the configuration that it is.
        assert self.parts

    def rows_per_shard(self, batch_size: int) -> int:
        """Number of rows of every batch that each shard gives.

        Raises:
            UserError: the shards do not divide the batch.
        """
        if batch_size % self.shards:
            raise UserError(
                f"batch_size {batch_size} is not a multiple of data.shards {self.shards}; change one of them"
            )
        return batch_size // self.shards

    @property
    def parts(self) -> tuple["DataConfig", ...]:
        """A configuration of its own for each part of the mixture; for a single source, this one."""
        if not self.mixture:
            return (self,)
        return tuple(
            replace(self, mixture=(), **{name: getattr(part, name) for name in PART_FIELDS}) for part in self.mixture
        )

    @property
    def has_loss_mask(self) -> bool:
        """True if batches say which tokens are targets, by `loss_mask`."""
        formats = (self.format, *(part.format for part in self.mixture))
        return any(each != TEXT for each in formats)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each part."""
        return tuple(part.weight for part in self.mixture) or (1.0,)

    @property
    def name(self) -> str:
        """Name of the source, or of all of them, for messages."""
        return ", ".join(source for part in self.parts for source in part.sources)

    @property
    def sources(self) -> tuple[str, ...]:
        """The source, or all of them in order."""
        return (self.source,) if isinstance(self.source, str) else tuple(self.source)

    @property
    def is_hub(self) -> bool:
        """True if a source is a whole data set on the Hugging Face Hub, which its own library reads."""
        return any(is_data_set(source) for part in self.parts for source in part.sources)

    @property
    def is_remote(self) -> bool:
        """True if a source is not on this machine, so that reading it for the first time needs the network."""
        return any(is_remote(source) for part in self.parts for source in part.sources)


def is_data_set(source: str) -> bool:
    """True for the name of a whole data set on the Hub."""
    return is_remote(source) and not RemoteName.parse(source).is_file
