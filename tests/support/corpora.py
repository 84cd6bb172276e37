"""Small corpora for tests: documents in memory, streams, and mixtures of both kinds."""

import itertools
import json
from functools import cache

import numpy as np

from lin_jax.data import Corpus, CorpusPart, DataConfig, Document, MixturePart, Tokenizer, stream_documents

RNG = np.random.default_rng(0)
SHARES = (0.55, 0.3, 0.15)


def documents(letter, count):
    """Documents that begin with a letter and their number, so that a token tells whose they are."""
    return [
        Document(f"{letter}{number}", f"{letter}{number} " + "some words " * int(RNG.integers(0, 12)))
        for number in range(count)
    ]


PARTS = {letter: documents(letter, count) for letter, count in zip("abc", (120, 70, 40), strict=True)}
TOKENIZER = Tokenizer.train([each.text for part in PARTS.values() for each in part], 300)


def write_tables(folder):
    """A folder a part, of three files each."""
    for letter, part in PARTS.items():
        (folder / letter).mkdir()
        for number in range(3):
            lines = "".join(json.dumps({"text": each.text}) + "\n" for each in part[number::3])
            (folder / letter / f"{number}.jsonl").write_text(lines)
    return folder


def mixture_config(folder, **options):
    """The mixture of all parts, from files."""
    weights = (11, 6, 3)
    parts = tuple(MixturePart(str(folder / letter), weight) for letter, weight in zip(PARTS, weights, strict=True))
    return DataConfig(mixture=parts, **options)


@cache
def corpus(kind, folder):
    """Documents in memory, a stream, or a mixture of either."""
    if kind == "in memory":
        return PARTS["a"]
    if kind == "stream":
        return stream_documents(DataConfig(source=str(folder / "a"), streaming=True))
    if kind == "mixture":
        return Corpus(tuple(CorpusPart(*each) for each in zip(PARTS, SHARES, PARTS.values(), strict=True)))
    return Corpus.open(mixture_config(folder, streaming=True))


KINDS = ("in memory", "stream", "mixture", "mixture of streams")


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            np.testing.assert_array_equal(mine[name], other[name])


def through_json(state):
    return json.loads(json.dumps(state))
