"""The versions of transformers that this code was tried with, and messages about all others."""

import re
import warnings

OLDEST, NEWEST = "4.57", "5.24"


def require_version(installed: str) -> None:
    """Refuses versions of transformers that cannot open this code.

    Raises:
        ImportError: the installed version is older than `OLDEST`.
    """
    if _number(installed) < _number(OLDEST):
        raise ImportError(
            f"this model needs transformers {OLDEST} or newer, not {installed}; install one of {_range()}"
        )


def warn_if_untried(installed: str) -> None:
    """Warns, once a process, about a version of transformers that is newer than all that were tried."""
    if _number(installed) > _number(NEWEST):
        warnings.warn(
            f"this model's code was never tried with transformers {installed}, only with {_range()}; "
            "compare a text with that of use_cache=False",
            stacklevel=2,
        )


def lost_state_message(given: int, kept: int, total: int, installed: str) -> str:
    """The error of a step that does not see the whole text.

    Args:
        given: tokens that the step was given.
        kept: tokens that the state holds which came with them.
        total: tokens of the text.
        installed: version of transformers.
    """
    return (
        f"generate gave {given} of {total} tokens and a state of {kept}: transformers {installed} does not hand the "
        f"state on; install one of {_range()}, or give use_cache=False"
    )


def _number(version: str) -> tuple[int, ...]:
    """Major and minor number."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _range() -> str:
    return f"{OLDEST} to {NEWEST}"
