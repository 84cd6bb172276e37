"""A run on a mixture in shards goes on exactly, and would on other processes."""

import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest

from lin_jax.data import Corpus, DataConfig, MixturePart, load_tokenizer, merged_positions, training_batches
from lin_jax.training.checkpoint.files import saved_steps
from lin_jax.training.monitoring.throughput import MACHINE_FIGURES
from lin_jax.training.monitoring.trackers import read_metrics
from lin_jax.training.run import train
from lin_jax.training.setup import resolve


@pytest.mark.thorough
def test_a_run_on_a_mixture_without_documents_goes_on_exactly(corpus, tiny_run, tmp_path):
    other = tmp_path / "other.jsonl"
    chance = random.Random(1)
    lines = [" ".join(chance.choices("zero one two three four".split(), k=40)) for _ in range(60)]  # noqa: SIM905
    other.write_text("".join(json.dumps({"content": line}) + "\n" for line in lines))
    parts = (
        MixturePart(str(corpus), 0.75, document_separator="<|endoftext|>"),
        MixturePart(str(other), 0.25, text_field="content"),
    )
    base = tiny_run(tmp_path / "run", steps=6, checkpoint_every=3, evaluate_every=3)
    data = DataConfig(
        mixture=parts,
        shards=2,
        separate_documents=False,
        cache=str(tmp_path / "tokens"),
        vocab_size=280,
        sequence_length=24,
        validation_batches=2,
        validation_fraction=0.1,
    )
    config = replace(base, data=data)
    train(config)
    whole = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(list((tmp_path / "tokens").glob("*.tokens"))) == 2
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    assert saved_steps(tmp_path / "run") == [3]
    train(config, resume=True)
    again = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [{name: line[name] for name in line.keys() - MACHINE_FIGURES} for line in again] == [
        {name: line[name] for name in line.keys() - MACHINE_FIGURES} for line in whole
    ]


def test_a_run_hands_its_position_to_more_processes(tiny_run, tmp_path):
    config = tiny_run(tmp_path / "run")
    config = replace(config, data=replace(config.data, shards=4))
    run = resolve(config, resume=False)
    for _ in range(5):
        next(run.batches)
    position = merged_positions([run.batches.get_state()])
    train_side, _ = Corpus.open(config.data).split(config.data.validation_fraction)
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer")
    parts = []
    for row in range(4):
        batches = training_batches(train_side, tokenizer, config.data, batch_size=4, seed=0, rows=(row, row + 1))
        batches.set_state(position)
        parts.append([next(batches)["tokens"] for _ in range(3)])
    for step in range(3):
        np.testing.assert_array_equal(next(run.batches)["tokens"], np.concatenate([part[step] for part in parts]))
