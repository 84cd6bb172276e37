import itertools
import random
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from support.cells import cells, some_of
from support.corpora import KINDS, PARTS, SHARES, TOKENIZER, assert_same, corpus, take, through_json

from lin_jax.data import DataConfig, merged_positions, training_batches
from lin_jax.data.loader.epochs import EpochShuffle, random_order
from lin_jax.data.loader.shards import SHUFFLED_ROWS
from lin_jax.data.tokens.tokenized import TokenizedDocuments
from lin_jax.errors import UserError

BATCH, SEED, LENGTH = 8, 5, 24
CONFIG = DataConfig(sequence_length=LENGTH)


def processes(kind, folder, shards, count):
    """The batches of each of so many processes, which share the rows equally."""
    text, config = corpus(kind, folder), replace(CONFIG, shards=shards)
    each = BATCH // count
    return [
        training_batches(text, TOKENIZER, config, batch_size=BATCH, seed=SEED, rows=(start, start + each))
        for start in range(0, BATCH, each)
    ]


def together(batches, count):
    """The rows of all processes side by side, so many times."""
    return [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*(take(each, count) for each in batches), strict=True)
    ]


def rows_of_part(part, number, shards):
    """The slow way: documents distributed and concatenated, for ever, in rows with the numbers of their documents."""
    tokens, owners = [], []
    for epoch in itertools.count():
        order = random_order(len(part), SEED, epoch)
        for place in [index for turn, index in enumerate(order) if turn % shards == number]:
            ids = TOKENIZER.encode_document(part[place].text).tolist()
            tokens, owners = tokens + ids, owners + [(epoch, place)] * len(ids)
            while len(tokens) > LENGTH:
                row, whose = tokens[: LENGTH + 1], owners[: LENGTH + 1]
                changes = [0, *(int(here != before) for before, here in itertools.pairwise(whose))]
                yield row, list(itertools.accumulate(changes, initial=1))[1:]
                tokens, owners = tokens[LENGTH + 1 :], owners[LENGTH + 1 :]


def rows_of_shard(parts, shares, number, shards):
    """The slow way: whichever part lacks most of its share is next; then windows are shuffled."""
    rows, taken = [rows_of_part(part, number, shards) for part in parts], [0] * len(parts)
    for window in itertools.count():
        mixed = []
        for _ in range(SHUFFLED_ROWS):
            lacking = [Fraction(share) * (sum(taken) + 1) - had for share, had in zip(shares, taken, strict=True)]
            part = lacking.index(max(lacking))
            taken[part] += 1
            mixed.append(next(rows[part]))
        for index in random_order(SHUFFLED_ROWS, SEED, number, window):
            yield mixed[index]


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("kind", ["in memory", "mixture"])
def test_batches_are_those_of_a_slow_reader(parts, kind, shards):
    used = list(PARTS.values())[: 1 if kind == "in memory" else 3]
    shares = (1.0,) if kind == "in memory" else SHARES
    readers = [rows_of_shard(used, shares, number, shards) for number in range(shards)]
    for batch in take(processes(kind, parts, shards, 1)[0], 40):
        expected = [row for reader in readers for row in itertools.islice(reader, BATCH // shards)]
        np.testing.assert_array_equal(batch["tokens"], [tokens for tokens, _ in expected])
        np.testing.assert_array_equal(batch["segment_ids"], [numbers for _, numbers in expected])


@pytest.mark.parametrize("shards", cells([4], [1, 2]))
@pytest.mark.parametrize("kind", some_of(KINDS, 2))
def test_a_run_goes_on_exactly_on_any_number_of_processes(parts, kind, shards):
    whole = take(processes(kind, parts, shards, 1)[0], 80)
    for before, after in ((1, 1), (1, 4), (2, 1), (4, 2)):
        steps = random.randint(0, 55)
        print(f"{before} processes, after {steps} steps {after}")
        first = processes(kind, parts, shards, before)
        assert_same(together(first, steps), whole[:steps])
        position = through_json(merged_positions([through_json(each.get_state()) for each in first]))
        second = processes(kind, parts, shards, after)
        # Some have read before they are set.
        take(second[0], random.randint(0, 3))
        for each in second:
            each.set_state(position)
        again = through_json(merged_positions([each.get_state() for each in second]))
        assert again == position
        assert_same(together(second, 25), whole[steps : steps + 25])


def test_a_process_opens_only_the_shards_of_its_rows(parts):
    for batches, expected in zip(processes("in memory", parts, 4, 2), (["0", "1"], ["2", "3"]), strict=True):
        assert list(batches.get_state()["shards"]) == expected
    assert [list(each.get_state()["shards"]) for each in processes("in memory", parts, 1, 2)] == [["0"], ["0"]]


def test_every_epoch_distributes_all_documents_in_a_new_order():
    shuffle = EpochShuffle(TokenizedDocuments(PARTS["a"], TOKENIZER), SEED, 7)
    orders = [[shuffle.shard_order(shard, epoch).tolist() for shard in range(7)] for epoch in range(4)]
    for epoch in orders:
        assert {len(shard_order) for shard_order in epoch} == {17, 18}
        assert sorted(itertools.chain(*epoch)) == list(range(120))
    assert len({tuple(epoch[0]) for epoch in orders}) == 4


def test_three_shards_of_a_stream_of_three_files_have_one_each(parts):
    config = DataConfig(sequence_length=500, shards=3, separate_documents=False)
    batches = training_batches(corpus("stream", parts), TOKENIZER, config, batch_size=3, seed=0)
    for batch in take(batches, 2):
        for shard, row in enumerate(batch["tokens"]):
            names = {text.split(" ")[0] for text in TOKENIZER.decode(row).split("<|endoftext|>")[1:-1]}
            assert len(names) > 5
            assert {int(name[1:]) % 3 for name in names} == {shard}


def test_positions_that_do_not_belong_together_are_refused(parts):
    one, two = processes("in memory", parts, 4, 2)
    whole = merged_positions([one.get_state(), two.get_state()])
    with pytest.raises(UserError, match="lacks shard 2"):
        two.set_state(one.get_state())
    with pytest.raises(UserError, match="no process holds data shard 2"):
        merged_positions([one.get_state()])
    other = processes("mixture", parts, 4, 1)[0]
    with pytest.raises(UserError, match="different runs"):
        merged_positions([one.get_state(), other.get_state()])
    next(one)
    with pytest.raises(UserError, match="different positions in data shard 0"):
        merged_positions([one.get_state(), whole])
    with pytest.raises(UserError, match="saved data position is for shards 4"):
        processes("in memory", parts, 2, 1)[0].set_state(whole)


def test_a_shard_without_text_is_named(parts):
    stream = corpus("stream", parts).filter(lambda row: int(row["text"].split(" ")[0][1:]) % 3 != 1)
    batches = training_batches(stream, TOKENIZER, replace(CONFIG, shards=3), batch_size=3, seed=0)
    with pytest.raises(UserError, match="shard 1 of 3 of the documents has no text"):
        next(batches)
