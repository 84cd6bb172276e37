"""JSON for other programs: a value a line, null where a number is none."""

import json
import math
from typing import Any


def json_line(value: Any) -> str:
    """Formats a value as JSON; NaN and infinities, which JSON does not have, as null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
