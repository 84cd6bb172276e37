"""Which checkpoint of a run is meant."""

from typing import Literal

# The step itself, the one with the lowest validation loss, or the newest.
Step = int | Literal["best"] | None


def parse_step(text: str) -> Step:
    """The step that a command line names: a number, or "best".

    Raises:
        ValueError: it is neither.
    """
    return "best" if text == "best" else int(text)


# What argparse calls a wrong value.
parse_step.__name__ = "step"
