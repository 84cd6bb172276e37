"""Processes that wait for others say for whom."""

import logging
import time

import jax
import pytest

from lin_jax.training.distributed import launch
from lin_jax.training.distributed.launch import Launch

CLUSTERS = ("SLURM_NTASKS", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "KUBERNETES_SERVICE_HOST")


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        (
            {},
            {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
            "process 0 of 4 (SLURM_NTASKS) waits for 1, 2, 3; start each with srun, or give --launch.cluster never",
        ),
        (
            {},
            {"OMPI_COMM_WORLD_SIZE": "64", "OMPI_COMM_WORLD_RANK": "7"},
            "process 7 of 64 (OMPI_COMM_WORLD_SIZE) waits for 63 others; start each with mpirun",
        ),
        (
            {"coordinator": "host:1", "processes": 2, "process": 1},
            {"SLURM_NTASKS": "4"},
            "process 1 of 2 waits for the others at host:1; start all",
        ),
        ({"cluster": "always"}, {}, "this process waits for others of its cluster"),
    ],
)
def test_a_process_that_waits_says_for_whom(options, environment, expected, monkeypatch, caplog):
    for name in CLUSTERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "_PATIENCE", 0.05)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_: time.sleep(0.3))
    with caplog.at_level(logging.WARNING):
        Launch(**options).join()
    (record,) = caplog.records
    assert record.getMessage().startswith(expected)
    # Those that find each other at once say nothing.
    caplog.clear()
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_: None)
    Launch(**options).join()
    time.sleep(0.1)
    assert caplog.records == []
