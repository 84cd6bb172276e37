"""What a person sees while a long corpus is tokenised, on stderr: a bar on a terminal, plain lines in a log file."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

# A short corpus is done before there is anything to show.
_FIRST_SHOWN = 2.0
_BETWEEN_LINES = 30.0


class TokenisingProgress:
    """A bar or lines with documents per second and time left.

    Args:
        documents: How many there are.
    """

    def __init__(self, documents: int) -> None:
        self._documents = documents
        self._done = 0
        self._began = self._said = time.monotonic()
        self._bar = tqdm(
            total=documents,
            desc="tokenising",
            unit=" documents",
            file=sys.stderr,
            delay=_FIRST_SHOWN,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> "TokenisingProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self, documents: int) -> None:
        """So many more documents are done."""
        self._done += documents
        self._bar.update(documents)
        now = time.monotonic()
        if self._bar.disable and now - self._said > _BETWEEN_LINES:
            self._said = now
            speed = self._done / (now - self._began)
            left = tqdm.format_interval((self._documents - self._done) / max(speed, 1e-9))
            print(
                f"tokenising: {self._done:,} of {self._documents:,} documents, {speed:,.0f} documents/s, {left} left",
                file=sys.stderr,
                flush=True,
            )
