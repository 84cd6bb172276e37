"""Progress of a run: a bar on a terminal and in a notebook, plain lines in a log file."""

from types import TracebackType

import jax
from tqdm import tqdm

from lin_jax.progress_bar import progress_bar, progress_stream
from lin_jax.training.hooks import Figures, Hook, Training
from lin_jax.training.train_step import StepMetrics


class Progress(Hook):
    """A bar, or lines, with loss, speed and time left; of several processes, the first one shows them.

    Args:
        steps: steps of the whole run.
        done: steps taken before.
        description: in front of the bar.
    """

    def __init__(self, steps: int, done: int = 0, description: str | None = None) -> None:
        self._steps = steps
        self._shown = jax.process_index() == 0
        self._bar = progress_bar(total=steps, initial=done, unit="step", desc=description, shown=self._shown)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def on_step(self, training: Training, metrics: StepMetrics) -> None:
        """Moves the bar on."""
        self._bar.update()

    def on_log(self, training: Training, figures: Figures) -> None:
        """Shows the figures of a logged step."""
        if "loss" not in figures:
            return
        text = f"loss {figures['loss']:.4f}, {figures['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in figures:
            text += f", MFU {100 * figures['mfu']:.1f}%"
        text += f", {figures['peak_memory_bytes'] / 2**30:.1f} GiB"
        if not self._bar.disable:
            self._bar.set_postfix_str(text)
            return
        left = tqdm.format_interval(figures["seconds_left"])
        self.on_note(f"step {training.step}/{self._steps}: {text}, {left} left")

    def on_validation(self, training: Training, figures: Figures) -> None:
        """Shows the figures of a validation."""
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.on_note(f"step {training.step}: validation: {shown}")

    def on_note(self, text: str) -> None:
        """Shows a line that stays."""
        if self._shown:
            self._write(text)

    def on_alarm(self, text: str) -> None:
        """Shows a line that stays, from any process: what only one of them knows."""
        self._write(text if jax.process_count() == 1 else f"process {jax.process_index()}: {text}")

    def _write(self, text: str) -> None:
        stream = progress_stream()
        tqdm.write(text, file=stream)
        stream.flush()
