"""Text that needs its past: stories of one cast, among which the facts of a document are told over and over.

    python benchmarks/fact_stories.py --output runs/fact_stories_text [--source PLACE ...] [--megabytes N]

A small model makes little use of what is hundreds of tokens behind it, for in short stories little comes back. Here
each document has a cast with invented names, who take the parts in a series of stories (real ones, from `--source`),
and its own facts: which town, pet, dish, song, ship and so on they speak of. After every few sentences one of the cast
names three of these again, never one of those named the last two times. Which they are can be known from where they
were named before, 130 tokens ago on average, and from nowhere else: 3 nats for each, in a document's first tellings
and without its past. A row of tokens from the middle of a document is like one from its beginning.

`train.txt` and `held_out.txt` hold documents with `<|endoftext|>` between them. The stories of the two are different
ones, and so are casts and facts. A model learns to look back in a fraction of the steps where there is nothing else to
learn: `bare.txt` has facts alone, in short documents, and `dense.txt` has them after every sentence. The same options
make the same bytes.
"""

import argparse
import random
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

from lin_jax.data import Corpus, DataConfig
from lin_jax.errors import OptionParser, UserError, exit_cleanly

SEPARATOR = "<|endoftext|>"
STORIES = ("hub:roneneldan/TinyStories/TinyStoriesV2-GPT4-train.txt",)
# Names of people and animals in the stories, which the cast's take the place of.
NAMES = """
Lily Tim Tom Max Sue Lucy Spot Timmy Mia Jack Bob Sam Sarah Sara Jane Amy Sally Daisy Kitty Ben John Fluffy Joe
Mary Billy Molly Anna Emma Grace Buddy Benny Bella Lisa Fin Ella Bobo Andy Momo Sophie Remy Polly Mark Lola Leo
Emily Bobby Ann Alex Rosie Penny Jenny Jake Fred Elly Bill Alice Rachel Pete Oliver Mimi Luna Kate Julie Joey
Jimmy Henry George Gary Chloe Charlie Buzz Zara Tweety Mittens Whiskers Ollie Peter Nemo Mike Tommy Jill
"""
# Words in their place, and of facts: a syllable with the ending of what it is.
SYLLABLES = "Ba Be Bo Da Di Do Fa Fe Ga Gu Ka Ki La Le Mo Na Ni Po Ra Ro Sa Ti Va Zo"
NAME = "lin"
ENDINGS = {
    "town": "ford",
    "pet": "pup",
    "dish": "tart",
    "song": "hymn",
    "ship": "mast",
    "tree": "wood",
    "king": "rex",
    "game": "ball",
    "river": "brook",
    "farm": "stead",
}
# Facts of a sentence, and the sentences of facts that pass before the same may be told again.
TOLD, RESTING = 3, 2

# Characters of a document, at least: some 3,500 tokens, 500 where facts are dense, and 400 of facts alone. Rows of one
# document are read one after the other, and a model would learn dense facts by heart, in its weights.
LONG, SHORT, SHORTEST = 12_000, 1_800, 1_000


@dataclass(frozen=True)
class Sizes:
    """Sizes of documents.

    Attributes:
        cast: names.
        sentences: of a story between facts; 0 is facts alone.
        characters: at least.
    """

    cast: int
    sentences: int
    characters: int


@dataclass(frozen=True)
class Book:
    """Names and facts of one document.

    Attributes:
        cast: names.
        facts: what they speak of, such as "the town Baford".
    """

    cast: tuple[str, ...]
    facts: tuple[str, ...]


def main() -> int:
    """Writes the files."""
    options = parse()
    stories = stories_of(options)
    held = max(len(stories) // 10, 1)
    options.output.mkdir(parents=True, exist_ok=True)
    sparse = Sizes(options.cast, options.sentences, LONG)
    for name, chosen, megabytes, sizes in (
        ("held_out", stories[:held], options.megabytes / 10, sparse),
        ("train", stories[held:], options.megabytes, sparse),
        ("dense", stories[held:], options.megabytes / 4, replace(sparse, sentences=1, characters=SHORT)),
        ("bare", stories[held:], options.megabytes / 2, replace(sparse, sentences=0, characters=SHORTEST)),
    ):
        chance = random.Random(f"{name} {options.seed}")
        made = list(documents(chosen, chance, sizes, megabytes * 1e6))
        path = options.output / f"{name}.txt"
        path.write_text(SEPARATOR.join(f"{each}\n" for each in made), encoding="utf-8")
        print(f"{path}: {len(made):,} documents, {sum(map(len, made)):,} characters, of {len(chosen):,} stories")
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/fact_stories_text"), help="folder of both files")
    parser.add_argument("--source", nargs="+", default=STORIES, metavar="PLACE", help="files of stories")
    parser.add_argument("--max-bytes", type=int, default=9_000_000, help="of the stories that are read")
    parser.add_argument("--megabytes", type=float, default=16, help="of text for training; a tenth more is held out")
    parser.add_argument("--cast", type=int, default=3, help="names of a document")
    parser.add_argument("--sentences", type=int, default=2, help="of a story between facts")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def stories_of(options: argparse.Namespace) -> list[str]:
    """The stories, shuffled."""
    source = tuple(options.source)
    config = DataConfig(source=source, document_separator=SEPARATOR, max_bytes=options.max_bytes)
    stories = [text for part in Corpus.open(config).parts for text in part.texts() if len(text) > 200]
    if len(stories) < 2:
        raise UserError(f"{len(stories)} stories of more than 200 characters in {source}; give files with more")
    random.Random(options.seed).shuffle(stories)
    return stories


def documents(stories: Sequence[str], chance: random.Random, sizes: Sizes, characters: float) -> Iterator[str]:
    """Yields documents until there are so many characters; stories begin again when all are told."""
    told, written = cycle(stories), 0
    while written < characters:
        document = "\n".join(pieces_of(told, make_book(chance, sizes), chance, sizes))
        written += len(document)
        yield document


def pieces_of(stories: Iterator[str], book: Book, chance: random.Random, sizes: Sizes) -> Iterator[str]:
    """Yields a few sentences of a story with facts behind them, until a document is long enough."""
    length, resting = 0, deque[str](maxlen=TOLD * RESTING)
    while length < sizes.characters:
        ends = re.split(r"(?<=[.!?])\s+", " ".join(recast(next(stories), book, chance).split()))
        for begin in range(0, len(ends), max(sizes.sentences, 1)):
            chosen = chance.sample([fact for fact in book.facts if fact not in resting], TOLD)
            resting.extend(chosen)
            *told, last = chosen
            fact = f"{chance.choice(book.cast)} spoke of {', '.join(told)} and {last}."
            piece = " ".join([*ends[begin : begin + sizes.sentences], fact])
            length += len(piece) + 1
            yield piece


def make_book(chance: random.Random, sizes: Sizes) -> Book:
    """Draws names and facts."""
    syllables = SYLLABLES.split()
    cast = tuple(syllable + NAME for syllable in chance.sample(syllables, sizes.cast))
    return Book(cast, tuple(f"the {kind} {chance.choice(syllables)}{ending}" for kind, ending in ENDINGS.items()))


def recast(story: str, book: Book, chance: random.Random) -> str:
    """The story with names of the cast, the most frequent first, in an order that is drawn for each story."""
    known = NAMES.split()
    found = Counter(word for word in re.findall(r"[A-Z][a-z]+", story) if word in known)
    cast = chance.sample(book.cast, len(book.cast))
    roles = dict(zip((name for name, _ in found.most_common(len(cast))), cast, strict=False))
    return re.sub(r"[A-Z][a-z]+", lambda word: roles.get(word.group(), word.group()), story)


if __name__ == "__main__":
    exit_cleanly(main)
