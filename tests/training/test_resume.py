import os
import random
import signal
import subprocess
import sys
import time

import pytest
from support.processes import ROOT

from lin_jax.training.checkpoint.files import saved_steps, validation_losses
from lin_jax.training.monitoring.throughput import MACHINE_FIGURES
from lin_jax.training.monitoring.trackers import read_metrics

STEPS = 30


def launch(output, corpus, *options):
    """The training script in a process of its own; steps take long enough to be interrupted."""
    settings = {
        "output": output,
        "data.source": corpus,
        "data.document_separator": "<|endoftext|>",
        "data.vocab_size": 280,
        "data.sequence_length": 64,
        "model.hidden_size": 64,
        "training.steps": STEPS,
        "training.plot": "false",
        "training.batch_size": 8,
        "training.log_every": 1,
        "training.checkpoint_every": 3,
        "training.evaluate_every": 7,
    }
    named = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, ROOT / "train.py", ROOT / "configs" / "tiny.yaml", *named, *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait(process, output, condition):
    """Waits until a checkpoint of a run is on disk and a condition holds."""
    deadline = time.monotonic() + 120
    while not saved_steps(output) or not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def interrupt(process, output, step, number):
    """Sends a signal once `step` is in the metrics and a checkpoint on disk; returns the exit status and stderr."""
    wait(process, output, lambda: read_metrics(output / "metrics.jsonl")[-1]["step"] >= step)
    os.kill(process.pid, number)
    said = process.communicate(timeout=60)[1]
    return process.returncode, said


def finish(process):
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    return said


@pytest.mark.users_settings
def test_a_stopped_run_continues_exactly(tmp_path, corpus):
    """One that is killed does so too: see benchmarks/kills.py and its test."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    stop_at = random.randint(8, 19)
    print(f"stopped after step {stop_at}")
    uninterrupted = launch(whole, corpus)
    # The others find its programs on the disk.
    wait(uninterrupted, whole, lambda: True)

    status, said = interrupt(launch(broken, corpus), broken, stop_at, signal.SIGTERM)
    assert status == 143
    last = saved_steps(broken)[-1]
    assert f"stopped by SIGTERM; saved {broken / 'checkpoints'}/{last}; add --resume to go on" in said
    assert stop_at <= last < STEPS

    said = finish(launch(broken, corpus, "--resume"))
    assert f"step {last}: going on from {broken / 'checkpoints'}/{last}" in said
    assert f"training {broken} on" in said
    assert f"{STEPS} steps, each of" in said
    finish(uninterrupted)
    assert saved_steps(broken)[-1] == saved_steps(whole)[-1] == STEPS

    found, expected = (
        [{name: line[name] for name in line.keys() - MACHINE_FIGURES} for line in read_metrics(run / "metrics.jsonl")]
        for run in (broken, whole)
    )
    assert found == expected
    assert [line["step"] for line in found if "loss" in line] == list(range(1, STEPS + 1))
    # The last step has a validation, whatever else is due, and its checkpoint knows that.
    losses = validation_losses(broken)
    assert losses == validation_losses(whole)
    assert losses[STEPS] == found[-1]["validation_loss"]
