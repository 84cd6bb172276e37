"""Prefetching: results of a slow function, computed in a thread while the last ones are in use."""

import contextlib
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")
# A result of the thread, or the error that ended it.
_Outcome = tuple[Item | None, BaseException | None]


class Prefetcher(Generic[Item]):
    """Calls a function over and over in a thread of its own, a few results ahead of its consumer.

    The thread ends with `close`, when this object is no longer used, or with the process, which never waits long
    for it: not even for a reader that hangs.

    Args:
        read: returns the next result; no other thread may touch what it works on until `close`.
        depth: number of results that wait, at most.
    """

    def __init__(self, read: Callable[[], Item], depth: int) -> None:
        self._results: queue.Queue[_Outcome[Item]] = queue.Queue(depth)
        stop = threading.Event()
        self._thread = threading.Thread(
            target=_fill, args=(read, self._results, stop), name="lin_jax-read-ahead", daemon=True
        )
        self._end = weakref.finalize(self, _end, self._results, stop, self._thread)
        self._thread.start()

    def take(self) -> Item:
        """Returns the next result; if the function raised an error in its place, raises it now and every time after."""
        result, error = self._results.get()
        if error is not None:
            self._results.put((None, error))
            raise error
        return result  # type: ignore[return-value]

    def close(self) -> None:
        """Ends the thread, however long its present call takes, and drops the results read ahead."""
        self._end()
        self._thread.join()


def _fill(read: Callable[[], Item], results: "queue.Queue[_Outcome[Item]]", stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            results.put((read(), None))
        except BaseException as error:  # the consumer must get it, whatever it is
            results.put((None, error))
            return


def _end(results: "queue.Queue[_Outcome[Item]]", stop: threading.Event, thread: threading.Thread) -> None:
    """Ends the thread; a daemon that is still in foreign code when the interpreter goes away may crash it."""
    stop.set()
    with contextlib.suppress(queue.Empty):
        while True:
            results.get_nowait()
    if thread is not threading.current_thread():
        thread.join(timeout=1)
