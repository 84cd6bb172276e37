"""The part of a text that training holds out, to measure models on."""

from dataclasses import dataclass, replace
from typing import Any

from lin_jax.data import Corpus, DataConfig, Tokenizer, validation_batches
from lin_jax.recipe import Text, text_data


@dataclass(frozen=True)
class HeldOut:
    """Held-out documents, the configuration that they are read with, and the tokens of a row in training."""

    config: DataConfig
    corpus: Corpus
    training_length: int

    @classmethod
    def of(cls, data: Text, model: Any, sequence_length: int | None, batches: int, *, longer: int = 1) -> "HeldOut":
        """Opens them, in rows that are `longer` times those of training, as far as the model's positions go."""
        config = text_data(data, model.config, sequence_length)
        length = longer * config.sequence_length
        length = min(length, getattr(model.config, "max_positions", None) or length)
        rows = replace(config, sequence_length=length, validation_batches=batches)
        return cls(rows, Corpus.open(rows).split(rows.validation_fraction)[1], config.sequence_length)

    def batches(self, tokenizer: Tokenizer, batch_size: int) -> list[Any]:
        """Rows of them."""
        return list(validation_batches(self.corpus, tokenizer, self.config, batch_size=batch_size))
