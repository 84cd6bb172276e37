"""Values that a test is tried with: some always, others only by `make test-all`."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def cells(always: Iterable[Any], thorough: Iterable[Any]) -> list[Any]:
    """Parameters of a test; one that is a tuple stands for several names."""
    further = (each if isinstance(each, tuple) else (each,) for each in thorough)
    return [*always, *(pytest.param(*each, marks=pytest.mark.thorough) for each in further)]


def some_of(values: Iterable[Any], always: int | Container[Any]) -> list[Any]:
    """Parameters of a test, of which the first few, or those that are named, are tried always.

    Args:
        values: the parameters, in order; one that is a tuple stands for several names.
        always: how many of them, or which.
    """
    values = list(values)
    kept = values[:always] if isinstance(always, int) else [each for each in values if each in always]
    return cells(kept, [each if isinstance(each, tuple) else (each,) for each in values if each not in kept])
