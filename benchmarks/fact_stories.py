"""Text that needs its past: stories of one cast, who sing the same rhymes over and over.

    python benchmarks/fact_stories.py --output runs/fact_stories_text [--source PLACE ...] [--megabytes N]

A small model makes little use of what is hundreds of tokens behind it, for in short stories little comes back. Here
each document has a cast of its own with invented names, who take the parts in a series of stories (real ones, from
`--source`), and each of the cast has a rhyme: words drawn at random for this document. After every few sentences one
of them sings it, never the same twice running. What is sung can be known from where it was sung before, more than a
hundred tokens ago, and from nowhere else. A row of tokens from the middle of a document is like one from its
beginning.

`train.txt` and `held_out.txt` hold documents with `<|endoftext|>` between them. The stories of the two are different
ones, and so are casts and rhymes. `dense.txt` has a rhyme after every sentence: a model learns to look back from it in
a fraction of the steps. The same options make the same bytes.
"""

import argparse
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
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
# Syllables of the names in their place, and the words of rhymes.
FIRST = """
Ba Be Bo Da Di Do Fa Fe Ga Gu Ka Ki Ko La Le Lo Ma Mo Na Ni No Pa Pi Po Ra Ri Ro Sa Si Ta Te To Va Vi Za Zo
"""
SECOND = """
bar bel dor dra fin fos gan gol kar kim lan lop mar mus nar nok pel pin ran rik sel sun tal tok van vik zan zul
"""
THINGS = """
apple ball barn basket bed bell boat book bottle box bread brush cake candle castle cave chair church clock
cloud coat corn cup door drum egg farm feather fence field fish flag flute forest fork garden gate glass grape
hat hill honey horn house island jam kite ladder lake lamp leaf lemon letter lion map market meadow milk mill
mirror moon mountain nest nut onion owl park pear pie pond pot pumpkin rice ring river road rock roof rope rose
sea shell ship shoe shop snow soup spoon star stone stove swing table tent tower train tree tunnel wagon well
wheel window wood
"""
# Characters of a document, at least; some 4,000 tokens.
LONG = 12_000


@dataclass(frozen=True)
class Sizes:
    """Sizes of documents.

    Attributes:
        cast: names.
        words: of a rhyme.
        sentences: of a story between two rhymes.
    """

    cast: int
    words: int
    sentences: int


@dataclass(frozen=True)
class Book:
    """Names and rhymes of one document.

    Attributes:
        cast: names.
        rhymes: sentences, one of each.
    """

    cast: tuple[str, ...]
    rhymes: tuple[str, ...]


def main() -> int:
    """Writes the files."""
    options = parse()
    stories = stories_of(options)
    held = max(len(stories) // 10, 1)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, chosen, megabytes, sentences in (
        ("held_out", stories[:held], options.megabytes / 10, options.sentences),
        ("train", stories[held:], options.megabytes, options.sentences),
        ("dense", stories[held:], options.megabytes / 4, 1),
    ):
        chance = random.Random(f"{name} {options.seed}")
        made = list(documents(chosen, chance, Sizes(options.cast, options.words, sentences), megabytes * 1e6))
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
    parser.add_argument("--words", type=int, default=4, help="of a rhyme")
    parser.add_argument("--sentences", type=int, default=8, help="of a story between two rhymes")
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
    """Yields a few sentences of a story with a rhyme behind them, until a document is long enough."""
    length, sung = 0, ""
    while length < LONG:
        ends = re.split(r"(?<=[.!?])\s+", " ".join(recast(next(stories), book, chance).split()))
        for begin in range(0, len(ends), sizes.sentences):
            sung = chance.choice([rhyme for rhyme in book.rhymes if rhyme != sung])
            piece = " ".join([*ends[begin : begin + sizes.sentences], sung])
            length += len(piece) + 1
            yield piece


def make_book(chance: random.Random, sizes: Sizes) -> Book:
    """Draws names and rhymes; no word is in two of a document's rhymes."""
    firsts, seconds = chance.sample(FIRST.split(), sizes.cast), chance.sample(SECOND.split(), sizes.cast)
    cast = tuple(first + second for first, second in zip(firsts, seconds, strict=True))
    words = iter(chance.sample(THINGS.split(), sizes.cast * sizes.words))
    return Book(cast, tuple(f"{name} sang: {' '.join(islice(words, sizes.words))}." for name in cast))


def recast(story: str, book: Book, chance: random.Random) -> str:
    """The story with names of the cast, the most frequent first, in an order that is drawn for each story."""
    known = NAMES.split()
    found = Counter(word for word in re.findall(r"[A-Z][a-z]+", story) if word in known)
    cast = chance.sample(book.cast, len(book.cast))
    roles = dict(zip((name for name, _ in found.most_common(len(cast))), cast, strict=False))
    return re.sub(r"[A-Z][a-z]+", lambda word: roles.get(word.group(), word.group()), story)


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
