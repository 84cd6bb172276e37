"""Runs of the recipes: what each stage learns, how fast, and for how long."""

import pytest

from lin_jax.data import DataConfig
from lin_jax.errors import UserError
from lin_jax.models import LlamaConfig
from lin_jax.recipe import Recipe

RECIPE = Recipe(LlamaConfig(vocab_size=11, hidden_size=64), DataConfig("x"), window_dropout=0.25)


def test_transfer_and_then_the_teachers_distributions_on_all_parameters():
    transfer, tune = RECIPE.linearize(90, lora=None, output="out")
    assert (transfer.training.steps, tune.training.steps) == (60, 30)
    assert transfer.objective == "attention_transfer"
    assert transfer.transfer.window_dropout == 0.25
    assert transfer.optimizer.learning_rate == pytest.approx(0.008)
    assert tune.adapters is None
    assert (tune.distillation.weight, tune.distillation.text_weight) == (1.0, 0.0)
    assert tune.optimizer.learning_rate == pytest.approx(0.0005)
    # A warm-up, and a cosine to a tenth.
    assert tune.optimizer.warmup_steps == 1
    assert tune.optimizer.min_lr_ratio == 0.1


def test_adapters_learn_from_the_text_too():
    _, tune = RECIPE.linearize(90, lora=4, output="out")
    assert tune.adapters is not None
    assert tune.adapters.rank == 4
    assert (tune.distillation.weight, tune.distillation.text_weight) == (1.0, 1.0)
    assert tune.optimizer.learning_rate == pytest.approx(0.001)


def test_both_stages_need_a_step():
    with pytest.raises(UserError, match="steps is 1; give 2 or more"):
        RECIPE.linearize(1, lora=None, output="out")
