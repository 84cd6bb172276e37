"""Model families: their types in a `config.json`, their models, and converters of configurations and tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx

from lin_jax.attention import AttentionConfig, softmax_window
from lin_jax.errors import UserError
from lin_jax.hub.families import bert, flash, gpt2, llama, t5
from lin_jax.hub.tensors import Entries
from lin_jax.json_files import short
from lin_jax.models import MODELS

PREFIX = "lin_jax_"
LLAMAS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "LinJaxLlamaForCausalLM")


def no_windows(config: Any) -> bool:
    """True if no attention of a configuration has a window."""
    attentions = [value for value in vars(config).values() if isinstance(value, AttentionConfig)]
    return all(softmax_window(kind) is None for each in attentions for kind in each.kinds)


@dataclass(frozen=True)
class Head:
    """A model of a family with a head for one purpose.

    Attributes:
        model: its class.
        architectures: transformers' names of such models; the first is written into `config.json`.
    """

    model: type[nnx.Module]
    architectures: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """A model family: names and converters between its models and Hugging Face checkpoints.

    Attributes:
        name: of the family; linearized models of it are of the type `lin_jax_NAME`.
        model_types: types in a `config.json` that are this family.
        heads: its models by purpose; the first is the default.
        config_from_huggingface: configuration from the contents of a `config.json`, with a given attention.
        config_to_huggingface: contents of a `config.json` from a configuration and the name of an architecture.
        entries: every tensor of a model by name.
        own_tensors: selects a checkpoint's tensors for a model: without buffers and copies, under the model's names.
        linearized_options: additional fields in the `config.json` of a linearized model.
        known: whether transformers has such models, with softmax attention.
        bases: transformers' names of its models without a head; they are read if the head is the embedding.
        head_name: name of the head's weight, which may be the embedding.
        embedding_name: name of an embedding that is a head too where `config.json` ties a head that the model has.
        unties: whether a head of its own makes the model of a checkpoint the same but for that.
        remarks: lines about what is read another way than it stands in a `config.json`.
        has_windows: whether transformers has a model with the windows of a configuration's softmax attention.
    """

    name: str
    model_types: tuple[str, ...]
    heads: Mapping[str, Head]
    config_from_huggingface: Callable[..., Any]
    config_to_huggingface: Callable[[Any, str], dict[str, Any]]
    entries: Callable[[Any], Entries]
    own_tensors: Callable[[Any, Mapping[str, Any]], dict[str, Any]]
    linearized_options: Callable[[Any], dict[str, Any]] = lambda config: {}
    known: bool = True
    bases: tuple[str, ...] = ()
    head_name: str = "lm_head.weight"
    embedding_name: str = ""
    unties: bool = False
    remarks: Callable[[Mapping[str, Any], Any], list[str]] = lambda config, model_config: []
    has_windows: Callable[[Any], bool] = no_windows

    @property
    def own_type(self) -> str:
        """Type of linearized models in a `config.json`."""
        return PREFIX + self.name if self.known else self.model_types[0]

    def head_for(self, name: str | None, architectures: Any) -> Head:
        """The head with a name, or else the one of a `config.json`'s architectures, or else the first.

        Raises:
            UserError: there is no head of that name, or the architecture is none of the family.
        """
        if name is not None:
            if name not in self.heads:
                raise UserError(f"head '{name}' is unknown for a {self.name}; choose one of {', '.join(self.heads)}")
            return self.heads[name]
        named = [architectures] if isinstance(architectures, str) else architectures or []
        if not isinstance(named, list | tuple) or not all(isinstance(each, str) for each in named):
            raise UserError(f"architectures is {short(architectures)} in config.json; give a list of names")
        for head in self.heads.values():
            if set(head.architectures) & set(named):
                return head
        if named and not set(named) & set(self.bases):
            every = [name for head in self.heads.values() for name in head.architectures]
            known = ", ".join(name for name in every if not name.startswith("LinJax"))
            raise UserError(
                f"architectures in config.json names a {named[0][:80]}, which is not supported; give "
                f"one of {known}, such as the model that it was trained from"
            )
        return next(iter(self.heads.values()))

    def foreign(self, architectures: Any) -> str | None:
        """The first of a `config.json`'s architectures, if the family has none of them; None if it has one."""
        try:
            self.head_for(None, architectures)
        except UserError:
            return str(architectures[0] if isinstance(architectures, list | tuple) else architectures)
        return None

    def own_head(self, architectures: Any) -> Head:
        """The head of a checkpoint of these architectures; the first, if they are none of the family."""
        try:
            return self.head_for(None, architectures)
        except UserError:
            return next(iter(self.heads.values()))

    def head_of(self, model: nnx.Module) -> Head:
        """The head of a model."""
        return next(head for head in self.heads.values() if type(model) is head.model)


def _heads(family: str, **architectures: tuple[str, ...]) -> dict[str, Head]:
    """The heads of a family, each with its architectures in transformers."""
    return {name: Head(MODELS[family].models[name], known) for name, known in architectures.items()}


FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="llama",
            model_types=llama.MODEL_TYPES,
            heads=_heads("llama", causal_lm=LLAMAS),
            config_from_huggingface=llama.config_from_huggingface,
            config_to_huggingface=lambda config, _: llama.config_to_huggingface(config),
            entries=llama.entries,
            own_tensors=llama.own_tensors,
            linearized_options=llama.linearized_options,
            bases=("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"),
            unties=True,
            remarks=llama.remarks,
            has_windows=llama.has_windows,
        ),
        Family(
            name="gpt2",
            model_types=("gpt2",),
            heads=_heads(
                "gpt2",
                causal_lm=("GPT2LMHeadModel", "LinJaxGPT2LMHeadModel"),
                classifier=("GPT2ForSequenceClassification",),
            ),
            config_from_huggingface=gpt2.config_from_huggingface,
            config_to_huggingface=gpt2.config_to_huggingface,
            entries=gpt2.entries,
            own_tensors=gpt2.own_tensors,
            bases=("GPT2Model",),
            unties=True,
        ),
        Family(
            name="t5",
            model_types=("t5",),
            heads=_heads(
                "t5",
                seq2seq=("T5ForConditionalGeneration", "LinJaxT5ForConditionalGeneration"),
                classifier=("T5ForSequenceClassification", "LinJaxT5ForSequenceClassification"),
            ),
            config_from_huggingface=t5.config_from_huggingface,
            config_to_huggingface=t5.config_to_huggingface,
            entries=t5.entries,
            own_tensors=t5.own_tensors,
            bases=("T5Model",),
            embedding_name=t5.EMBEDDING,
        ),
        Family(
            name="bert",
            model_types=("bert",),
            heads=_heads(
                "bert",
                masked_lm=("BertForMaskedLM", "BertForPreTraining", "LinJaxBertForMaskedLM"),
                encoder=("BertModel", "LinJaxBertModel"),
                classifier=("BertForSequenceClassification", "LinJaxBertForSequenceClassification"),
            ),
            config_from_huggingface=bert.config_from_huggingface,
            config_to_huggingface=bert.config_to_huggingface,
            entries=bert.entries,
            own_tensors=bert.own_tensors,
            head_name="cls.predictions.decoder.weight",
        ),
        Family(
            name="flash",
            model_types=(flash.MODEL_TYPE,),
            heads=_heads("flash", causal_lm=("FlashForCausalLM", "LinJaxFlashForCausalLM"), encoder=("FlashEncoder",)),
            config_from_huggingface=flash.config_from_huggingface,
            config_to_huggingface=flash.config_to_huggingface,
            entries=flash.entries,
            own_tensors=flash.own_tensors,
            known=False,
        ),
    )
}


def family_of_type(model_type: Any) -> Family:
    """The family of a model type in a `config.json`.

    Raises:
        UserError: no family has this type.
    """
    for family in FAMILIES.values():
        if model_type in (*family.model_types, family.own_type):
            return family
    known = ", ".join(name for family in FAMILIES.values() for name in family.model_types)
    raise UserError(f"model_type {short(model_type)} in config.json is not supported; give one of {known}")


def family_of_model(model: nnx.Module) -> Family:
    """The family of a model.

    Raises:
        UserError: no family has such a model.
    """
    for family in FAMILIES.values():
        if type(model) in (head.model for head in family.heads.values()):
            return family
    raise UserError(f"{type(model).__name__} belongs to no family of the hub; give a model of {', '.join(FAMILIES)}")
