"""Progress of a part of the demo: a bar on terminals and in notebooks, lines with the time left elsewhere."""

import sys
import time

from tqdm import tqdm

from lin_jax.progress_bar import progress_bar

# Seconds between two lines, where output goes to a file.
BETWEEN_LINES = 5.0


def say(line: str) -> None:
    """Shows a line that stays."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


class PartProgress:
    """Counts the steps of a part, and shows how many are left and for how long.

    Args:
        total: the steps.
        unit: what a step is called.
    """

    def __init__(self, total: int, unit: str) -> None:
        self._total, self._unit = total, unit
        self._done = 0
        self._began = self._shown = time.perf_counter()
        self._bar = progress_bar(total=total, unit=unit, leave=False)

    def __enter__(self) -> "PartProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self, what: str = "") -> None:
        """Counts a step.

        Args:
            what: was done in it.
        """
        self._done += 1
        self._bar.set_postfix_str(what, refresh=False)
        self._bar.update()
        now = time.perf_counter()
        if not self._bar.disable or (now - self._shown < BETWEEN_LINES and self._done < self._total):
            return
        self._shown = now
        left = (now - self._began) / self._done * max(self._total - self._done, 0)
        about = f", {what}" if what else ""
        say(f"    {self._unit} {self._done}/{self._total}{about}, {tqdm.format_interval(left)} left")

    def leave_out(self, steps: int) -> None:
        """Takes steps away that are not to be."""
        self._total -= steps
        self._bar.total = self._total
        self._bar.refresh()
