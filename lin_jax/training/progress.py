"""What a person sees of a running job, on stderr: a bar on a terminal, plain lines in a log file."""

import sys
from collections.abc import Mapping
from types import TracebackType

import jax
from tqdm import tqdm


class Progress:
    """A bar or lines with loss, speed and time left; of several processes, the first one shows them.

    Args:
        steps: steps of the whole run.
        done: steps taken before.
    """

    def __init__(self, steps: int, done: int = 0) -> None:
        self._steps = steps
        self._shown = jax.process_index() == 0
        bar = self._shown and sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=done, unit="step", file=sys.stderr, dynamic_ncols=True, disable=not bar)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self) -> None:
        """One step is done."""
        self._bar.update()

    def show(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures of a logged step."""
        text = f"loss {figures['loss']:.4f}, {figures['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in figures:
            text += f", MFU {100 * figures['mfu']:.1f}%"
        text += f", {figures['peak_memory_bytes'] / 2**30:.1f} GiB"
        if not self._bar.disable:
            self._bar.set_postfix_str(text)
            return
        self.note(f"step {step}/{self._steps}: {text}, {tqdm.format_interval(figures['seconds_left'])} left")

    def note(self, text: str) -> None:
        """A line that stays."""
        if self._shown:
            self._write(text)

    def alarm(self, text: str) -> None:
        """A line that stays, from any process: what only one of them knows."""
        self._write(text if jax.process_count() == 1 else f"process {jax.process_index()}: {text}")

    def _write(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()
