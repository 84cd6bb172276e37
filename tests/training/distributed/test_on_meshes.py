"""Losses and gradients of every family are the same on every mesh."""

import json

import pytest
from support.cells import cells
from support.processes import printed


@pytest.mark.parametrize(
    ("models", "meshes"),
    cells(
        [("mix", "mixed")],
        [
            ("llama", "data fsdp tensor sequence mixed"),
            ("mix", "data fsdp tensor sequence"),
            ("gpt2 flash", "data fsdp tensor sequence mixed"),
            ("windowed", "data fsdp tensor sequence whole mixed"),
            ("t5", "data fsdp tensor sequence whole mixed"),
        ],
    ),
)
def test_losses_and_gradients_are_those_of_one_device(models, meshes):
    reports = [
        json.loads(line)
        for line in printed(
            "on_meshes.py",
            "--models",
            *models.split(),
            "--meshes",
            *meshes.split(),
            devices=8,
        )
    ]
    assert len(reports) == len(models.split()) * len(meshes.split())
    for report in reports:
        assert report["loss"] < 1e-5, report
        assert report["gradient"] < 1e-5, report
        assert report["cut"] or report["mesh"] == "data"
