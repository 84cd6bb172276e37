from pathlib import Path

import pytest

from lin_jax.training.stages.config import parse_command

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("**/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_is_read(path):
    plan, resume, _ = parse_command([str(path)])
    assert not resume
    assert str(plan.output) == f"runs/{path.stem}"
