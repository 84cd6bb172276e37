import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing

from lin_jax.data import (
    Corpus,
    CorpusPart,
    DataConfig,
    Document,
    Tokenizer,
    split_documents,
    stream_documents,
    training_batches,
    validation_batches,
)
from lin_jax.data.loader.shards import pack
from lin_jax.data.tokens.pieces import LONGEST_PIECE
from lin_jax.data.tokens.stream import TokenizedStream
from lin_jax.data.tokens.tokenized import TokenizedDocuments
from lin_jax.errors import UserError

RNG = np.random.default_rng(0)
# Every document begins with its number and the same words follow, so that a token tells whose it is.
DOCUMENTS = [Document(f"d{number}", f"[{number}] " + "some words " * int(RNG.integers(0, 12))) for number in range(60)]
CONFIG = DataConfig(sequence_length=24, validation_batches=3)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([document.text for document in DOCUMENTS], 300)


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    for part in range(3):
        rows = DOCUMENTS[part * 20 : (part + 1) * 20]
        lines = "".join(json.dumps({"text": document.text}) + "\n" for document in rows)
        (folder / f"{part}.jsonl").write_text(lines)
    return stream_documents(DataConfig(source=str(folder), streaming=True))


@pytest.fixture(params=["in memory", "streamed"])
def documents(request, stream):
    return DOCUMENTS if request.param == "in memory" else stream


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys() == {"tokens", "segment_ids"}
        for name in mine:
            np.testing.assert_array_equal(mine[name], other[name])


def pieces(batches):
    """The runs of tokens that belong together, row by row."""
    found = []
    for batch in batches:
        for tokens, numbers in zip(batch["tokens"], batch["segment_ids"], strict=True):
            assert numbers[0] == 1
            assert set(np.diff(numbers)) <= {0, 1}
            starts = np.flatnonzero(np.diff(numbers)) + 1
            found += [piece.tolist() for piece in np.split(tokens, starts)]
    return found


def test_batches_are_static_int32_and_seeded(documents, tokenizer):
    first = take(training_batches(documents, tokenizer, CONFIG, batch_size=4, seed=3), 50)
    for batch in first:
        for name in ("tokens", "segment_ids"):
            assert batch[name].shape == (4, 25)
            assert batch[name].dtype == np.int32
        assert batch["segment_ids"].min() == 1
        assert batch["tokens"].max() < tokenizer.vocab_size
    assert_same(first, take(training_batches(documents, tokenizer, CONFIG, batch_size=4, seed=3), 50))
    other = take(training_batches(documents, tokenizer, CONFIG, batch_size=4, seed=4), 50)
    assert any((mine["tokens"] != theirs["tokens"]).any() for mine, theirs in zip(first, other, strict=True))


@pytest.mark.parametrize("steps", [0, 1, 7, 15, 16, 17, 40])
def test_restored_equals_uninterrupted(documents, tokenizer, steps):
    batches = training_batches(documents, tokenizer, CONFIG, batch_size=4, seed=0)
    take(batches, steps)
    state = json.loads(json.dumps(batches.get_state()))
    rest = take(batches, 40)
    fresh = training_batches(documents, tokenizer, CONFIG, batch_size=4, seed=0)
    fresh.set_state(state)
    assert_same(take(fresh, 40), rest)
    used = training_batches(documents, tokenizer, CONFIG, batch_size=4, seed=0)
    take(used, 5)
    used.set_state(state)
    assert_same(take(used, 40), rest)
    assert json.loads(json.dumps(batches.get_state())) == json.loads(json.dumps(fresh.get_state()))


@pytest.mark.parametrize("rows_per_document", [1, 3])
def test_restored_where_rows_end_with_their_documents(rows_per_document):
    """A position without a remainder, saved as JSON, keeps the document that comes next."""
    in_bytes = Tokenizer.train(["a"], 257)
    digits = 5 * rows_per_document - 1
    documents = [Document(str(number), str(number).zfill(digits)) for number in range(1000)]
    config = DataConfig(sequence_length=4)
    for steps in (0, 1, 63, 64, 65, 128, 192, 193):
        batches = training_batches(documents, in_bytes, config, batch_size=1, seed=0)
        take(batches, steps)
        fresh = training_batches(documents, in_bytes, config, batch_size=1, seed=0)
        fresh.set_state(json.loads(json.dumps(batches.get_state())))
        assert_same(take(fresh, 66), take(batches, 66))


def test_packed_rows_are_the_documents_in_order(stream, tokenizer):
    rows = iter(pack(TokenizedStream(stream, tokenizer, "stream"), CONFIG))
    flat, runs = [], []
    for row in itertools.islice(rows, 100):
        flat += row["tokens"].tolist()
        runs += pieces([{name: value[None] for name, value in row.items()}])
    expected = [tokenizer.encode_document(document.text).tolist() for document in DOCUMENTS]
    endless = itertools.chain.from_iterable(itertools.cycle(expected))
    assert flat == list(itertools.islice(endless, len(flat)))
    # Numbers change exactly where documents do: a run is (part of) one document.
    assert all(run.count(tokenizer.eos_id) == (run[-1] == tokenizer.eos_id) for run in runs)


def test_each_epoch_has_every_token_once_in_a_new_order(tokenizer):
    ids = [tokenizer.encode_document(document.text) for document in DOCUMENTS]
    total = sum(len(row) for row in ids)
    config = DataConfig(sequence_length=total - 1)
    batches = take(training_batches(DOCUMENTS, tokenizer, config, batch_size=1, seed=0), 64)
    orders = set()
    for batch in batches:
        runs = pieces([batch])
        assert sorted(map(tuple, runs)) == sorted(tuple(row.tolist()) for row in ids)
        orders.add(tuple(map(tuple, runs)))
    assert len(orders) == 64


def test_small_corpora_repeat(tokenizer):
    batches = training_batches([Document("a", "some words")], tokenizer, CONFIG, batch_size=8, seed=0)
    assert take(batches, 3)[2]["tokens"].shape == (8, 25)


def test_shards_read_different_documents(documents, tokenizer):
    seen = []
    for index in range(3):
        config = DataConfig(sequence_length=200, shards=3)
        batches = training_batches(documents, tokenizer, config, batch_size=3, seed=0, rows=(index, index + 1))
        seen.append({tuple(piece) for piece in pieces(take(batches, 4)) if piece[-1] == tokenizer.eos_id})
    assert all(seen)
    if documents is not DOCUMENTS:  # in memory, documents change shard from one epoch to the next
        assert not set.intersection(*seen)


def test_streams_made_from_one_do_not_disturb_each_other(stream, tokenizer):
    train, validation = split_documents(stream, 0.3)
    alone = take(training_batches(train, tokenizer, CONFIG, batch_size=2, seed=0), 60)
    next(iter(stream))
    batches = training_batches(train, tokenizer, CONFIG, batch_size=2, seed=0)
    mixed = []
    for _ in range(60):
        mixed += take(batches, 1)
        state = json.loads(json.dumps(batches.get_state()))
        validation_batches(validation, tokenizer, CONFIG, batch_size=2)
        next(iter(train))
    assert_same(mixed, alone)
    fresh = training_batches(train, tokenizer, CONFIG, batch_size=2, seed=0)
    fresh.set_state(state)
    assert_same(take(fresh, 5), take(batches, 5))


def test_position_of_another_run_is_refused(tokenizer):
    state = training_batches(DOCUMENTS, tokenizer, CONFIG, batch_size=4, seed=0).get_state()
    halves = tuple(CorpusPart(name, 0.5, DOCUMENTS) for name in "ab")
    others = {
        "seed": training_batches(DOCUMENTS, tokenizer, CONFIG, batch_size=4, seed=1),
        "corpus": training_batches(DOCUMENTS[1:], tokenizer, CONFIG, batch_size=4, seed=0),
        "sequence_length": training_batches(DOCUMENTS, tokenizer, DataConfig(sequence_length=25), batch_size=4, seed=0),
        "tokenizer": training_batches(DOCUMENTS, Tokenizer.train(["ab"], 257), CONFIG, batch_size=4, seed=0),
        "shards": training_batches(DOCUMENTS, tokenizer, replace(CONFIG, shards=2), batch_size=4, seed=0),
        "mixture": training_batches(Corpus(halves), tokenizer, CONFIG, batch_size=4, seed=0),
    }
    for name, batches in others.items():
        with pytest.raises(UserError, match=name):
            batches.set_state(state)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**31}, "seed"),
        ({"rows": (2, 2)}, "rows 2 to 2"),
        ({"rows": (0, 5)}, "rows 0 to 5"),
        ({"shards": 3}, "batch_size 4 is not a multiple of data.shards 3"),
        ({"batch_size": 61, "shards": 61}, "60 training documents"),
    ],
)
def test_bad_arguments(tokenizer, options, expected):
    config = replace(CONFIG, shards=options.get("shards", 1))
    options = {name: value for name, value in options.items() if name != "shards"}
    with pytest.raises(UserError, match=expected):
        training_batches(DOCUMENTS, tokenizer, config, **{"batch_size": 4, "seed": 0, **options})


def test_empty_stream_is_refused(stream, tokenizer):
    empty = stream.filter(lambda row: False)
    with pytest.raises(UserError, match="no text to train on"):
        next(training_batches(empty, tokenizer, CONFIG, batch_size=4, seed=0))
    with pytest.raises(UserError, match="no text is held out"):
        validation_batches(empty, tokenizer, CONFIG, batch_size=4)
    with pytest.raises(UserError, match="no text is held out"):
        validation_batches([], tokenizer, CONFIG, batch_size=4)


def test_validation_is_fixed_and_capped(documents, tokenizer):
    batches = validation_batches(documents, tokenizer, CONFIG, batch_size=4)
    assert_same(batches, validation_batches(documents, tokenizer, CONFIG, batch_size=4))
    assert len(batches) == CONFIG.validation_batches
    assert all(batch["segment_ids"].min() == 1 for batch in batches)
    whole = {tuple(tokenizer.encode_document(document.text)) for document in DOCUMENTS}
    runs = pieces(batches)
    assert all(any("".join(map(chr, run)) in "".join(map(chr, ids)) for ids in whole) for run in runs)


def test_short_validation_text_is_padded(tokenizer):
    documents = DOCUMENTS[:7]
    config = DataConfig(sequence_length=24, validation_batches=10)
    batches = validation_batches(documents, tokenizer, config, batch_size=4)
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    numbers = np.concatenate([batch["segment_ids"] for batch in batches])
    assert tokens.shape == numbers.shape
    assert tokens.shape[0] % 4 == 0
    assert tokens.dtype == numbers.dtype == np.int32
    expected = sorted(tuple(tokenizer.encode_document(document.text)) for document in documents)
    text = tokens[numbers > 0].tolist()
    ends = np.flatnonzero(np.asarray(text) == tokenizer.eos_id) + 1
    assert sorted(tuple(part.tolist()) for part in np.split(text, ends)[:-1]) == expected
    assert (tokens[numbers == 0] == 0).all()
    assert (numbers == 0).sum() < 4 * 25


def test_long_documents_come_in_pieces():
    """Together they are the document, marks at its own ends only, and shuffling mixes them with the others."""
    rng = np.random.default_rng(0)
    lines = ["".join(rng.choice(list("abcdef "), 60)) + "\n" for _ in range(900)]
    documents = (Document("long", "".join(lines)), Document("unbroken", "x" * 40000), Document("short", "abc"))
    tokenizer = Tokenizer.train([lines[0]], 257)
    source = TokenizedDocuments(documents, tokenizer)
    assert len(source) == 4 + 3 + 1
    tokens = [source[index]["tokens"] for index in range(len(source))]
    assert all(len(piece) <= LONGEST_PIECE + 1 for piece in tokens)
    for begin, end, document in ((0, 4, documents[0]), (4, 7, documents[1]), (7, 8, documents[2])):
        assert np.array_equal(np.concatenate(tokens[begin:end]), tokenizer.encode_document(document.text))
    assert all(tokenizer.decode(piece).endswith("\n") for piece in tokens[:3])
    # Each piece begins as a prompt does, where that has a token of its own.
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.post_processor = TemplateProcessing(single="a $A", special_tokens=[("a", backend.token_to_id("a"))])
    begun = Tokenizer(backend, bos_token="a", eos_token="<|endoftext|>")
    for unmarked, marked in zip(tokens, map(TokenizedDocuments(documents, begun).__getitem__, range(8)), strict=True):
        np.testing.assert_array_equal(marked["tokens"], [begun.bos_id, *unmarked])


def test_rows_without_documents_are_the_same_tokens(documents, tokenizer):
    plain = replace(CONFIG, separate_documents=False)
    for ours, theirs in zip(
        take(training_batches(documents, tokenizer, plain, batch_size=4, seed=0), 20),
        take(training_batches(documents, tokenizer, CONFIG, batch_size=4, seed=0), 20),
        strict=True,
    ):
        assert list(ours) == ["tokens"]
        np.testing.assert_array_equal(ours["tokens"], theirs["tokens"])


def test_validation_without_documents_has_whole_batches_only(tokenizer):
    plain = DataConfig(sequence_length=24, validation_batches=10, separate_documents=False)
    batches = validation_batches(DOCUMENTS[:20], tokenizer, plain, batch_size=4)
    padded = validation_batches(DOCUMENTS[:20], tokenizer, replace(plain, separate_documents=True), batch_size=4)
    whole = [batch["tokens"] for batch in padded if batch["segment_ids"].all()]
    assert len(batches) == len(whole) == len(padded) - 1
    for ours, theirs in zip(batches, whole, strict=True):
        assert list(ours) == ["tokens"]
        np.testing.assert_array_equal(ours["tokens"], theirs)
    with pytest.raises(UserError, match="less than one batch of 64 rows"):
        validation_batches(DOCUMENTS[:20], tokenizer, plain, batch_size=64)
