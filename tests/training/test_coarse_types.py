"""Learning in a type whose numbers lie far apart: said, with the parameters for which it is true."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from lin_jax.training import OptimizerConfig
from lin_jax.training.setup import resolve


def test_updates_that_are_rounded_away(tiny_run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tiny_run(tmp_path / "wide", optimizer=OptimizerConfig(learning_rate=1e-6))
    resolve(run, resume=False)
    assert "parameters are learnt in" not in caplog.text
    narrow = replace(run, output=str(tmp_path / "narrow"), model=replace(run.model, param_dtype="bfloat16"))
    resolve(narrow, resume=False)
    (line,) = [line for line in caplog.messages if "parameters are learnt in bfloat16" in line]
    assert line.endswith("give model.param_dtype float32, which model.dtype bfloat16 computes with as well")
    bound = float(re.search(r"above ([0-9.e-]+);", line)[1])
    # Above it every step of the learning rate is lost; a quarter of it still moves.
    sizes = jnp.linspace(bound * 1.05, 1.0, 1000).astype(jnp.bfloat16)
    assert jnp.array_equal((sizes.astype(jnp.float32) + 1e-6).astype(jnp.bfloat16), sizes)
    small = jnp.asarray(bound / 4, jnp.bfloat16)
    assert (small.astype(jnp.float32) + 1e-6).astype(jnp.bfloat16) != small
