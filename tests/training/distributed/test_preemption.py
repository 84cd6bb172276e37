import signal
import socket
import subprocess
import sys

import pytest
from support.processes import ROOT

from lin_jax.training.distributed.preemption import StopSignal


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
