"""Recipes: configurations of the runs that linearize or train a model, from a text and a number of steps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

from lin_jax.data import DataConfig
from lin_jax.errors import UserError
from lin_jax.models.adapters import AdapterConfig
from lin_jax.models.registry import family_of_config
from lin_jax.training import OptimizerConfig, RunConfig, TrainingConfig
from lin_jax.training.objective_configs import DistillationConfig, TransferConfig

Text = str | Path | Sequence[str | Path] | DataConfig
# In memory there is no folder; the name stands in messages.
IN_MEMORY = "(in memory)"
# Learning rates fall with the root of the width, as those of the recipes in configs/ do: from 0.008 at 64 to 0.001 at
# 4096 for attention transfer, and an eighth of that where all of a model is trained on text. To learn its teacher's
# distributions it takes half of that: transfer has left it not far from them, and faster it forgets what it has learnt
# (docs/linearizing.md has the trials).
_TRANSFER_RATE = 0.064
_TRAIN_RATE = _TRANSFER_RATE / 8
_DISTILL_RATE = _TRAIN_RATE / 2
# Share of the steps in which every layer's attention learns from the teacher's, before all of the model is trained.
_TRANSFER_SHARE = 2 / 3


@dataclass(frozen=True)
class Recipe:
    """Options that every run of a recipe shares.

    Attributes:
        model: configuration of the model.
        data: the text.
        batch_size: rows of a step.
        learning_rate: as a multiple of the recipe's.
        seed: of everything random.
        window_dropout: probability with which attention transfer narrows a layer's softmax window in a step, for
            attentions that have one.
    """

    model: Any
    data: DataConfig
    batch_size: int = 16
    learning_rate: float = 1.0
    seed: int = 0
    window_dropout: float = 0.0

    def linearize(self, steps: int, *, lora: int | None, output: str) -> list[RunConfig]:
        """Configures attention transfer (Zhang et al. 2024), then distillation.

        Without adapters, all parameters learn the teacher's next-token distributions and nothing else; adapters learn
        from the text, too, as in the paper's recipe.

        Args:
            steps: of both together.
            lora: rank of the adapters that are trained in the second run; None trains everything.
            output: folder of both.

        Raises:
            UserError: there are too few steps.
        """
        if steps < 2:
            raise UserError(f"steps is {steps}; give 2 or more: attention transfer and tuning need one each")
        first = min(max(round(steps * _TRANSFER_SHARE), 1), steps - 1)
        transfer = self._run(first, f"{output}/transfer", _TRANSFER_RATE)
        whole = lora is None
        tune = self._run(steps - first, f"{output}/tune", _DISTILL_RATE if whole else _TRAIN_RATE)
        distillation = DistillationConfig(weight=1.0, text_weight=0.0 if whole else 1.0)
        return [
            replace(
                transfer,
                objective="attention_transfer",
                transfer=TransferConfig(window_dropout=self.window_dropout),
            ),
            replace(tune, distillation=distillation, adapters=_adapters(lora)),
        ]

    def train(self, steps: int, *, lora: int | None, output: str) -> RunConfig:
        """Configures training on the next token; arguments as in `linearize`."""
        return replace(self._run(steps, output, _TRAIN_RATE), adapters=_adapters(lora))

    def _run(self, steps: int, output: str, rate: float) -> RunConfig:
        rate *= self.learning_rate / sqrt(self.model.hidden_size)
        return RunConfig(
            output=output,
            init_from=IN_MEMORY,
            family=family_of_config(self.model).name,
            model=self.model,
            data=self.data,
            optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=max(steps // 20, 1), weight_decay=0.0),
            training=TrainingConfig(
                steps=steps,
                batch_size=self.batch_size,
                seed=self.seed,
                log_every=max(min(steps // 10, 10), 1),
                evaluate_every=max(steps // 4, 1),
                checkpoint_every=max(steps // 4, 1),
            ),
        )


def text_data(text: Text, model: Any, sequence_length: int | None) -> DataConfig:
    """Describes the text to train on.

    Args:
        text: path of a file or folder, `hub:OWNER/NAME`, a list of paths, or a configuration, taken as it is.
        model: configuration of the model.
        sequence_length: tokens read at once; None is 256, or fewer where the model has fewer positions.
    """
    if isinstance(text, DataConfig):
        return text if sequence_length is None else replace(text, sequence_length=sequence_length)
    source = str(text) if isinstance(text, str | Path) else tuple(str(each) for each in text)
    length = sequence_length or min(256, getattr(model, "max_positions", None) or 256)
    return DataConfig(source, sequence_length=length, validation_batches=8)


def _adapters(rank: int | None) -> AdapterConfig | None:
    return None if rank is None else AdapterConfig(rank=rank)
