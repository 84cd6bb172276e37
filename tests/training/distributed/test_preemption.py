import signal
import socket
import subprocess
import sys

import pytest
from support.processes import ROOT

from lin_jax.data import TrainingBatches
from lin_jax.training.checkpoint.files import saved_steps
from lin_jax.training.distributed.preemption import StopSignal
from lin_jax.training.run import train

WARNINGS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture(autouse=True)
def not_ignored():
    """Signals as in a terminal: under `nohup`, SIGHUP is ignored, and so is SIGINT in the background."""
    before = {each: signal.signal(each, signal.SIG_DFL) for each in WARNINGS}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


def test_ctrl_c_saves_and_a_second_one_is_not_swallowed():
    # What Python does by itself, unless it was started in the background.
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        assert stop.poll(None) is None
        signal.raise_signal(signal.SIGINT)
        assert stop.poll(None) == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    signal.signal(signal.SIGINT, found)


@pytest.mark.thorough
def test_a_signal_to_one_process_stops_all_at_the_same_step():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = ROOT / "tests/support/stopping_together.py"
    started = [
        subprocess.Popen(
            [sys.executable, script, str(port), str(process)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for process in range(2)
    ]
    ended = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    # The last line; others are of what carries the processes' words.
    first, second = (out.splitlines()[-1].split() for out, _ in ended)
    # Sent in step 7, voted on before step 8, heard a round later.
    assert first == second == ["9", "SIGTERM"]


@pytest.mark.parametrize("number", WARNINGS)
def test_a_warning_saves_and_neither_it_nor_a_first_term_ends_the_saving(number):
    with StopSignal() as stop:
        for _ in range(3):
            signal.raise_signal(number)
            assert stop.poll(None) == number
        # What a cluster sends when its warning has been heard; the first signal names the end.
        signal.raise_signal(signal.SIGTERM)
        assert stop.poll(None) == number
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        signal.raise_signal(number)
    assert [signal.getsignal(each) for each in WARNINGS] == [signal.SIG_DFL] * 3


def test_signals_that_others_ignore_or_handle_are_left_alone():
    heard = []
    before = {each: signal.getsignal(each) for each in (signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)}
    # As `nohup` starts a process, as a shell starts one in the background, and a handler of somebody else.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, lambda *_: heard.append("theirs"))
    try:
        with StopSignal() as stop:
            for each in before:
                signal.raise_signal(each)
            assert (stop.poll(None), heard) == (None, ["theirs"])
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_a_warned_run_ends_saved(tmp_path, tiny_run, monkeypatch):
    number = signal.SIGUSR1
    before = TrainingBatches.__next__
    steps = []

    def read(batches):
        steps.append(len(steps))
        if len(steps) == 3:
            signal.raise_signal(number)
        return before(batches)

    monkeypatch.setattr(TrainingBatches, "__next__", read)
    outcome = train(tiny_run(tmp_path, steps=9, checkpoint_every=100))
    assert (outcome.step, outcome.stopped_by, outcome.status) == (3, number, 128 + number)
    assert saved_steps(tmp_path) == [3]
