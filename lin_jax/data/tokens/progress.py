"""Progress of tokenizing a long corpus, on stderr: a bar on a terminal, plain lines in a log file."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

# A short corpus is done before there is anything to show.
_FIRST_SHOWN = 2.0
_BETWEEN_LINES = 30.0


class TokenizingProgress:
    """Shows documents per second and time left, as a bar or as lines.

    Args:
        documents: number of documents.
    """

    def __init__(self, documents: int) -> None:
        self._documents = documents
        self._done = 0
        self._began = self._shown = time.monotonic()
        self._bar = tqdm(
            total=documents,
            desc="tokenizing",
            unit=" documents",
            file=sys.stderr,
            delay=_FIRST_SHOWN,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> "TokenizingProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self, documents: int) -> None:
        """Counts documents as done."""
        self._done += documents
        self._bar.update(documents)
        now = time.monotonic()
        if self._bar.disable and now - self._shown > _BETWEEN_LINES:
            self._shown = now
            speed = self._done / (now - self._began)
            left = tqdm.format_interval((self._documents - self._done) / max(speed, 1e-9))
            print(
                f"tokenizing: {self._done:,} of {self._documents:,} documents, {speed:,.0f} documents/s, {left} left",
                file=sys.stderr,
                flush=True,
            )
