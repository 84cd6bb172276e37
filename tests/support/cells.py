"""Values that a test is tried with: some always, others only by `make test-all`."""

from collections.abc import Iterable
from typing import Any

import pytest


def cells(always: Iterable[Any], thorough: Iterable[Any]) -> list[Any]:
    """Parameters of a test; one that is a tuple stands for several names."""
    further = (each if isinstance(each, tuple) else (each,) for each in thorough)
    return [*always, *(pytest.param(*each, marks=pytest.mark.thorough) for each in further)]
