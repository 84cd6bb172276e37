"""Results of a slow function, computed in a thread while the last ones are being used."""

import contextlib
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")
# What the thread hands over: a result, or the error that ended it.
_Handed = tuple[Item | None, BaseException | None]


class ReadAhead(Generic[Item]):
    """Calls a function over and over in a thread of its own, a few results ahead of who takes them.

    The thread ends with `close`, when this object is no longer used, or with the process, which never waits long
    for it: not even for a reader that hangs.

    Args:
        read: Gives the next result; no other thread may touch what it works on until `close`.
        depth: How many results wait at the most.
    """

    def __init__(self, read: Callable[[], Item], depth: int) -> None:
        self._results: queue.Queue[_Handed[Item]] = queue.Queue(depth)
        stop = threading.Event()
        self._thread = threading.Thread(
            target=_fill, args=(read, self._results, stop), name="lin_jax-read-ahead", daemon=True
        )
        self._end = weakref.finalize(self, _end, self._results, stop, self._thread)
        self._thread.start()

    def take(self) -> Item:
        """Returns the next result, or raises what the function raised in its place, now and ever after."""
        result, error = self._results.get()
        if error is not None:
            self._results.put((None, error))
            raise error
        return result  # type: ignore[return-value]

    def close(self) -> None:
        """Ends the thread, however long the call under way takes, and drops what was read ahead."""
        self._end()
        self._thread.join()


def _fill(read: Callable[[], Item], results: "queue.Queue[_Handed[Item]]", stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            results.put((read(), None))
        except BaseException as error:  # whoever takes results must hear of it, whatever it is
            results.put((None, error))
            return


def _end(results: "queue.Queue[_Handed[Item]]", stop: threading.Event, thread: threading.Thread) -> None:
    """Lets the thread end; a daemon that is still in foreign code when the interpreter goes away may crash it."""
    stop.set()
    with contextlib.suppress(queue.Empty):
        while True:
            results.get_nowait()
    if thread is not threading.current_thread():
        thread.join(timeout=1)
