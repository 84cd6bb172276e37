import gc
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from support.corpora import PARTS, TOKENIZER, take

from lin_jax.data import Corpus, CorpusPart, DataConfig, training_batches
from lin_jax.data.loader.mixture import SourceClock
from lin_jax.data.loader.prefetch import Prefetcher
from lin_jax.errors import UserError


def readers():
    return [thread for thread in threading.enumerate() if thread.name == "lin_jax-read-ahead"]


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_results_come_in_order_and_are_made_ahead():
    made = []

    def read():
        made.append(len(made))
        return made[-1]

    ahead = Prefetcher(read, 3)
    # Three wait, and one more is made that has no room.
    until(lambda: len(made) == 4)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]
    assert [ahead.take() for _ in range(50)] == list(range(50))
    ahead.close()
    count = len(made)
    time.sleep(0.05)
    assert len(made) == count


def test_an_error_comes_in_its_turn_and_stays():
    results = iter([1, 2])

    def read():
        if (found := next(results, None)) is None:
            raise UserError("no more")
        return found

    ahead = Prefetcher(read, 1)
    assert [ahead.take(), ahead.take()] == [1, 2]
    for _ in range(3):
        with pytest.raises(UserError, match="no more"):
            ahead.take()
    ahead.close()


def test_an_iterator_that_is_thrown_away_leaves_no_thread():
    gc.collect()
    until(lambda: not readers())
    batches = training_batches(PARTS["a"], TOKENIZER, DataConfig(sequence_length=24), batch_size=4, seed=0)
    assert not readers()
    next(batches)
    assert len(readers()) == 1
    del batches
    until(lambda: not readers())


def test_a_process_does_not_wait_for_a_reader_that_hangs():
    program = (
        "import time\nfrom lin_jax.data.loader.prefetch import Prefetcher\n"
        "ahead = Prefetcher(lambda: time.sleep(1000), 2)\nprint(time.time(), flush=True)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert time.time() - float(result.stdout) < 10


class SlowTokenizer:
    """A tokenizer that waits for a gate before it reads one of the parts."""

    def __init__(self, letter):
        self.letter = letter
        self.gate = threading.Event()

    def __getattr__(self, name):
        return getattr(TOKENIZER, name)

    def encode(self, text):
        if text.startswith(self.letter):
            assert self.gate.wait(20)
        return TOKENIZER.encode(text)


def test_waits_are_measured_and_say_for_whom():
    tokenizer = SlowTokenizer("b")
    mixture = Corpus((CorpusPart("quick", 0.5, PARTS["a"]), CorpusPart("slow", 0.5, PARTS["b"])))
    batches = training_batches(mixture, tokenizer, DataConfig(sequence_length=24), batch_size=4, seed=0)
    assert (batches.waited, batches.source_name) == (0.0, "quick")
    seen = []

    def watch():
        until(lambda: batches.waited > 0.3)
        seen.append(batches.source_name)
        tokenizer.gate.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    next(batches)
    watcher.join()
    assert seen == ["slow"]
    assert batches.waited > 0.3
    assert batches.source_name == "slow"
    until(lambda: batches._ahead._results.full())
    next(batches)
    assert batches.waited < 0.2


def test_the_slowest_source_of_a_lap_is_named():
    clock = SourceClock("first")
    assert clock.lap() == "first"
    for name, seconds in (("a", 0.0), ("b", 0.02), ("a", 0.0)):
        with clock.reading(name):
            assert clock.current == name
            time.sleep(seconds)
    assert clock.current is None
    assert [clock.lap(), clock.lap()] == ["b", "b"]


class HastyTokenizer(SlowTokenizer):
    """A tokenizer that reads beginnings only."""

    def encode_document(self, text):
        return TOKENIZER.encode_document(text[:5000])


def test_a_bad_line_is_one_line_of_complaint(tmp_path):
    """Deep in a file, where a stream finds it only after it has begun: readers take some megabytes at a time."""
    path = tmp_path / "text.jsonl"
    path.write_text(('{"text": "' + "word " * 200_000 + '"}\n') * 24 + '{"text": "\n')
    config = DataConfig(source=str(path), sequence_length=24)
    expected = f"cannot read {path}: "
    with pytest.raises(UserError, match=expected) as error:
        Corpus.open(config)
    stream = Corpus.open(replace(config, streaming=True))
    batches = training_batches(stream, HastyTokenizer(""), config, batch_size=1, seed=0)
    with pytest.raises(UserError, match=expected) as streamed:
        take(batches, 10_000)
    assert "\n" not in str(error.value) + str(streamed.value)
