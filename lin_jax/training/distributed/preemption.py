"""Signals as a wish to stop after the present step, so that there is a checkpoint to go on from.

Ctrl-C and SIGTERM; SIGHUP of a terminal that is closed; SIGUSR1 and SIGUSR2, with which SLURM and others warn.

Where several processes train together, one of them being told to stop stops all of them, and after the same step.
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

STOPS = (signal.SIGINT, signal.SIGTERM)
WARNINGS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopSignal:
    """While open, the first signal is remembered in `signal`; a second Ctrl-C or SIGTERM acts as it always does.

    Warnings come several times, and before a SIGTERM: none of them ends the saving that the first began. Signals that
    the process was started to ignore (as `nohup` has it), and warnings that somebody else handles, are left alone.
    Outside the main thread, where Python cannot handle signals, it does nothing.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._ballot = ProcessVote() if jax.process_count() > 1 else None

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            ours = [each for each in STOPS if signal.getsignal(each) is not signal.SIG_IGN]
            ours += [each for each in WARNINGS if signal.getsignal(each) is signal.SIG_DFL]
            self._before = {each: signal.signal(each, self._remember) for each in ours}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore(*self._before)

    def poll(self, newest: Any) -> signal.Signals | None:
        """Returns the signal to stop for, or None, the same on all processes; to be called before each step.

        Args:
            newest: arrays that the devices are still at work on, if they are at any.
        """
        if self._ballot is None:
            return self.signal
        heard = self._ballot.cast(0 if self.signal is None else int(self.signal), newest)
        return signal.Signals(heard) if heard else None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)
        if number in STOPS:
            self._restore(*STOPS)

    def _restore(self, *signals: signal.Signals) -> None:
        for each in signals:
            if each in self._before:
                signal.signal(each, self._before.pop(each))


class ProcessVote:
    """The largest of a number from each process, a round late, so that no device waits for the host.

    JAX's own service for this (`multihost_utils.reached_preemption_sync_point`) hears of SIGTERM alone, and no longer
    once Python handles that.
    """

    def __init__(self) -> None:
        first = {device.process_index: device for device in reversed(jax.devices())}
        self._count = len(first)
        self._mesh = Mesh(np.array([first[process] for process in sorted(first)]), ("process",))
        self._one_each = NamedSharding(self._mesh, PartitionSpec("process"))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(self._mesh, PartitionSpec()))
        self._last: jax.Array | None = None

    def cast(self, number: int, newest: Any) -> int:
        """Gives this process's number, and returns the largest of the round before; 0 in the first."""
        # CPUs, unlike other devices, run what they are given at once, and would mix up what the processes send.
        in_turn = jax.default_backend() == "cpu"
        if in_turn:
            jax.block_until_ready(newest)
        own = jax.make_array_from_process_local_data(self._one_each, np.array([number], np.int32), (self._count,))
        # Whatever mesh the run is on, this needs one device of each process.
        with jax.set_mesh(self._mesh):
            last, self._last = self._last, self._largest(own)
        if in_turn:
            self._last.block_until_ready()
        return 0 if last is None else int(last.addressable_data(0))
