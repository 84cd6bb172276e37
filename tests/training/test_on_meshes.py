"""Losses and gradients of every family are the same on every mesh."""

import json

import pytest
from processes import ROOT, printed


@pytest.mark.parametrize(
    ("models", "meshes"),
    [("llama", "data fsdp tensor sequence mixed"), ("gpt2 flash", "mixed"), ("t5", "mixed whole")],
    ids=["llama", "gpt2, flash", "t5"],
)
def test_losses_and_gradients_are_those_of_one_device(models, meshes):
    reports = [
        json.loads(line)
        for line in printed(
            "training/on_meshes.py",
            "--models",
            *models.split(),
            "--meshes",
            *meshes.split(),
            PYTHONPATH=str(ROOT),
            JAX_DISABLE_MOST_OPTIMIZATIONS="1",
        )
    ]
    assert len(reports) == len(models.split()) * len(meshes.split())
    for report in reports:
        assert report["loss"] < 1e-5, report
        assert report["gradient"] < 1e-5, report
        assert report["cut"] or report["mesh"] == "data"
