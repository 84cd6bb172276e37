"""What a person sees of a running job, on stderr: a bar on a terminal, plain lines in a log file."""

import sys
import time
from types import TracebackType

from tqdm import tqdm


class Progress:
    """A bar or lines with loss, speed and time left.

    Args:
        steps: steps of the whole run.
        done: steps taken before.
    """

    def __init__(self, steps: int, done: int = 0) -> None:
        self._steps = steps
        self._first = done
        self._start: float | None = None
        self._bar = tqdm(
            total=steps, initial=done, unit="step", file=sys.stderr, dynamic_ncols=True, disable=not sys.stderr.isatty()
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self) -> None:
        """One step is done."""
        if self._start is None:
            # The first step is slow: it waits for the compiler.
            self._first, self._start = self._first + 1, time.monotonic()
        self._bar.update()

    def show(self, step: int, loss: float, tokens_per_second: float) -> None:
        """The figures of a logged step."""
        figures = f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s"
        if not self._bar.disable:
            self._bar.set_postfix_str(figures)
            return
        elapsed = 0.0 if self._start is None else time.monotonic() - self._start
        left = elapsed / max(step - self._first, 1) * (self._steps - step)
        self.note(f"step {step}/{self._steps}: {figures}, {tqdm.format_interval(left)} left")

    def note(self, text: str) -> None:
        """A line that stays."""
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()
