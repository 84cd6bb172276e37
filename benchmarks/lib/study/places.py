"""Places of the study's texts, models and tasks: public names, or what the command line puts in their stead."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lin_jax.data import DataConfig
from lin_jax.errors import UserError

_BABY = "https://raw.githubusercontent.com/EN10/BabyLlama/a8f9b9408785f9272d03b74da05a68a6474fbe08"
_STORIES = "hub:roneneldan/TinyStories"
# Numbers of novels in Project Gutenberg: Moby-Dick, Bleak House.
_NOVELS = ("2701", "1023")


@dataclass(frozen=True)
class TextPlace:
    """A place, and for a text how it is read.

    Attributes:
        source: as `data.source` or `init_from` takes it; several are separated by commas.
        subset: configuration of a data set of the hub.
        separator: marker between documents.
        max_bytes: that are read at most.
    """

    source: str
    subset: str | None = None
    separator: str | None = None
    max_bytes: int | None = None

    def data(self, length: int, batches: int, *, fraction: float = 0.05, most: int | None = None) -> DataConfig:
        """The text as training reads it, in rows of `length` tokens, with `fraction` of it held out."""
        sources = tuple(self.source.split(","))
        return DataConfig(
            sources[0] if len(sources) == 1 else sources,
            subset=self.subset,
            document_separator=self.separator,
            max_bytes=self.max_bytes if most is None else most,
            sequence_length=length,
            validation_batches=batches,
            validation_fraction=fraction,
        )


PUBLIC = {
    "stories": TextPlace(f"{_STORIES}/TinyStoriesV2-GPT4-train.txt", separator="<|endoftext|>", max_bytes=6_000_000),
    "stories-held-out": TextPlace(f"{_STORIES}/TinyStories-valid.txt", separator="<|endoftext|>", max_bytes=1_000_000),
    "wikitext": TextPlace("hub:Salesforce/wikitext", subset="wikitext-2-raw-v1"),
    "books": TextPlace(",".join(f"https://www.gutenberg.org/cache/epub/{each}/pg{each}.txt" for each in _NOVELS)),
    "glue": TextPlace("hub:nyu-mll/glue"),
    "stories260K": TextPlace("hub:karpathy/tinyllamas/stories260K/stories260K.bin"),
    "stories260K-tokenizer": TextPlace("hub:karpathy/tinyllamas/stories260K/tok512.bin"),
    "babyllama105": TextPlace(f"{_BABY}/tok105/model5000.bin"),
    "babyllama105-tokenizer": TextPlace(f"{_BABY}/tok105/tok105.model"),
}
# Without public places of their own; they are measured where these are named.
OPTIONAL = ("babyllama361", "babyllama361-tokenizer")
TEXTS = ("stories", "stories-held-out", "wikitext", "books")


def places_of(given: Mapping[str, str], *, quick: bool) -> dict[str, TextPlace]:
    """All places; a quick trial reads Python's standard library and fetches nothing.

    Args:
        given: places in the stead of the public ones, by name.
        quick: whether this is a quick trial.

    Raises:
        UserError: a name is unknown.
    """
    for name in given:
        if name not in (*PUBLIC, *OPTIONAL):
            raise UserError(f"--data {name}=... is unknown; choose among {', '.join((*PUBLIC, *OPTIONAL))}")
    places = dict(PUBLIC)
    if quick:
        places |= dict.fromkeys(TEXTS, TextPlace("python-stdlib"))
    for name, source in given.items():
        before = places.get(name, TextPlace(""))
        places[name] = replace(before, source=source, subset=None)
    return places
