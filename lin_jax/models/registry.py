"""Model families by name: the configuration of each, and its models by purpose."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx

from lin_jax.errors import UserError
from lin_jax.models.bert import Bert, BertClassifier, BertConfig, BertMaskedLM
from lin_jax.models.flash.config import FlashConfig
from lin_jax.models.flash.model import Flash, FlashEncoder
from lin_jax.models.gpt2 import Gpt2, Gpt2Classifier, Gpt2Config
from lin_jax.models.llama import Llama, LlamaConfig
from lin_jax.models.t5.config import T5Config
from lin_jax.models.t5.model import T5, T5Classifier

CAUSAL_LM = "causal_lm"
CLASSIFIER = "classifier"

ModelConfig = LlamaConfig | Gpt2Config | T5Config | BertConfig | FlashConfig


@dataclass(frozen=True)
class ModelFamily:
    """One architecture.

    Attributes:
        name: of the family.
        config: class of its configurations.
        models: its models by what they are for; the first is the usual one.
    """

    name: str
    config: type[Any]
    models: Mapping[str, type[nnx.Module]]


MODELS = {
    family.name: family
    for family in (
        ModelFamily("llama", LlamaConfig, {CAUSAL_LM: Llama}),
        ModelFamily("gpt2", Gpt2Config, {CAUSAL_LM: Gpt2, CLASSIFIER: Gpt2Classifier}),
        ModelFamily("t5", T5Config, {"seq2seq": T5, CLASSIFIER: T5Classifier}),
        ModelFamily("bert", BertConfig, {"masked_lm": BertMaskedLM, "encoder": Bert, CLASSIFIER: BertClassifier}),
        ModelFamily("flash", FlashConfig, {CAUSAL_LM: Flash, "encoder": FlashEncoder}),
    )
}


def model_family(name: str) -> ModelFamily:
    """The family of a name.

    Raises:
        UserError: there is none.
    """
    if name not in MODELS:
        raise UserError(f"family '{name}' is unknown; choose one of {', '.join(MODELS)}")
    return MODELS[name]


def family_of_config(config: ModelConfig) -> ModelFamily:
    """The family that a configuration belongs to."""
    return next(family for family in MODELS.values() if type(config) is family.config)


def model_class(config: ModelConfig, purpose: str) -> type[Any]:
    """The class of the models with a configuration that are for something, such as `causal_lm`.

    Raises:
        UserError: the configuration's family has no such model.
    """
    family = family_of_config(config)
    if purpose not in family.models:
        able = ", ".join(each.name for each in MODELS.values() if purpose in each.models)
        raise UserError(f"family '{family.name}' has no model for {purpose}; choose one of {able}")
    return family.models[purpose]
