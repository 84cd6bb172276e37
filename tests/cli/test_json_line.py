"""JSON that any other program reads."""

import json
import math

from lin_jax.cli.json_line import json_line


def test_what_is_no_number_is_null() -> None:
    value = {"a": [1, 2.5, math.nan, (math.inf, -math.inf)], "b": None, "c": True, "d": "x\u2028"}
    line = json_line(value)
    assert json.loads(line, parse_constant=lambda name: 1 / 0) == {**value, "a": [1, 2.5, None, [None, None]]}
    assert "\n" not in line
