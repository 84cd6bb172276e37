from pathlib import Path

import pytest

from lin_jax.training import parse_run_config

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("**/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_is_read(path):
    config, resume, _ = parse_run_config([str(path)])
    assert not resume
    assert config.output == f"runs/{path.stem}"
