"""Runs of models whose layers have attentions of several kinds: begun from another, resumed, read and exported."""

import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.attention import AttentionConfig
from lin_jax.hub import from_pretrained, save_pretrained
from lin_jax.models.params import params_of
from lin_jax.training import load_run_config
from lin_jax.training.model_source import load_model
from lin_jax.training.monitoring.trackers import read_metrics
from lin_jax.training.run import train


@pytest.mark.thorough
def test_a_mix_learns_from_a_teacher_and_is_read_again(base_run, tmp_path, tiny_model, tiny_run):
    """A layer that has the teacher's attention misses nothing; a resumed run ends where a whole one does."""
    mix = replace(tiny_model, attention=replace(tiny_model.attention, layers={1: {"name": "softmax", "window": 6}}))
    options = {"model": mix, "init_from": str(base_run), "log_every": 1, "evaluate_every": 2, "checkpoint_every": 1}
    run = tiny_run(tmp_path / "whole", objective="attention_transfer", steps=2, **options)
    train(run)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "2")
    train(replace(run, output=str(tmp_path / "parts")), resume=True)
    metrics = [line for line in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "validation_missed" in line]
    assert metrics[0]["validation_missed_layer_0"] == 0
    assert metrics[0]["validation_missed_layer_1"] > 0
    assert load_run_config(tmp_path / "whole").model.attention == mix.attention
    models = [load_model(tmp_path / folder)[0] for folder in ("whole", "parts")]
    jax.tree.map(np.testing.assert_array_equal, *map(params_of, models))
    base = params_of(load_model(base_run)[0])["layers"]["layers"]["attention"]["mixer"]
    own = params_of(models[0])["layers"]["mixer"]["kind0"]
    np.testing.assert_array_equal(own["alpha"], base["alpha"][:1])  # No error, no step.
    assert models[0].config.attention == AttentionConfig(pattern=mix.attention.of_layers(2)).for_layers(2)

    again = from_pretrained(save_pretrained(models[0], tmp_path / "out"))
    tokens = jnp.arange(20)[None]
    np.testing.assert_array_equal(again(tokens), models[0](tokens))
    # The layer that was softmax gets an attention of its own; the other keeps what it has learnt.
    linear = from_pretrained(tmp_path / "out", attention=tiny_model.attention)
    mixer = params_of(linear)["layers"]["layers"]["attention"]["mixer"]
    np.testing.assert_array_equal(mixer["alpha"], [own["alpha"][0], [np.float32(0.1)]])
