"""One run in several processes on one machine: they train together, one is killed, and a single one goes on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from support.processes import ROOT

STEPS, KILLED_AFTER = 12, 7
# One process must not read a program that another is writing.
ALONE = {"PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "0"}


def start(corpus, output, *options):
    """A process of `train.py` on the tiny configuration, with one device."""
    command = [sys.executable, ROOT / "train.py", ROOT / "configs" / "tiny.yaml", "--output", output]
    command += ["--data.source", corpus, "--data.document_separator", "<|endoftext|>", "--training.steps", STEPS]
    command += ["--training.log_every", 1, "--training.checkpoint_every", 3, "--training.evaluate_every", 6]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*map(str, command), *options], cwd=ROOT, env=os.environ | ALONE, **pipes)


def start_pair(corpus, output, *options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    launch = [f"--launch.coordinator={address}", "--launch.processes=2", "--mesh.fsdp=2"]
    return [start(corpus, output, *launch, f"--launch.process={number}", *options) for number in range(2)]


def losses(output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def saved(output, step):
    return (output / "checkpoints" / str(step)).is_dir()


@pytest.mark.thorough
def test_a_pair_of_processes_of_which_one_dies_goes_on_as_one(corpus, tmp_path):
    alone = start(corpus, tmp_path / "alone")
    output = alone.communicate(timeout=300)[0]
    assert alone.returncode == 0, output
    expected = losses(tmp_path / "alone")
    assert len(expected) == STEPS

    pair = start_pair(corpus, tmp_path / "pair")
    until = time.monotonic() + 240
    while time.monotonic() < until and not saved(tmp_path / "pair", 6) and all(each.poll() is None for each in pair):
        time.sleep(0.02)
    assert saved(tmp_path / "pair", 6), [each.communicate()[0] for each in pair if each.poll() is not None]
    pair[1].send_signal(signal.SIGKILL)
    # The other cannot go on alone; whether it says so or is killed as well, nothing on disk may be spoilt.
    time.sleep(1)
    pair[0].kill()
    for each in pair:
        each.communicate()

    last = start(corpus, tmp_path / "pair", "--resume")
    output = last.communicate(timeout=300)[0]
    assert last.returncode == 0, output
    assert "going on from" in output
    assert losses(tmp_path / "pair") == pytest.approx(expected, rel=1e-5)


@pytest.mark.thorough
def test_a_pair_linearizes_as_one_does(corpus, tmp_path):
    """Base and teacher are read onto the devices of both, and memories are fitted to the teacher by both."""
    told = start(corpus, tmp_path / "base", "--model.attention.name=softmax").communicate(timeout=300)[0]
    assert saved(tmp_path / "base", STEPS), told
    options = [f"--init_from={tmp_path / 'base'}", "--objective=attention_transfer"]
    options += ["--model.attention.name=clustered+window", "--model.attention.window=9"]
    processes = [start(corpus, tmp_path / "alone", *options), *start_pair(corpus, tmp_path / "pair", *options)]
    outputs = [each.communicate(timeout=300)[0] for each in processes]
    assert [each.returncode for each in processes] == [0, 0, 0], outputs
    assert "memories of" in outputs[0]
    assert "memories of" in outputs[1]
    assert losses(tmp_path / "pair") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)


def test_processes_that_do_not_find_each_other_say_so(corpus, tmp_path):
    lonely = start(corpus, tmp_path / "run", "--launch.coordinator=127.0.0.1:1", "--launch.processes=2")
    output = lonely.communicate(timeout=120)[0]
    assert lonely.returncode == 2
    assert output.strip().splitlines()[-1].startswith("error: launch.coordinator, launch.processes and launch.process")
