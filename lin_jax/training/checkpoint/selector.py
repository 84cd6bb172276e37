"""Names of a checkpoint of a run: its step, the newest, or the best."""

from typing import Literal

# The step itself, the one with the lowest validation loss, or the newest.
CheckpointSelector = int | Literal["best"] | None


def parse_selector(text: str) -> CheckpointSelector:
    """The step that a command line names: a number, or "best".

    Raises:
        ValueError: it is neither.
    """
    return "best" if text == "best" else int(text)


# What argparse calls a wrong value.
parse_selector.__name__ = "step"
