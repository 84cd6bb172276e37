"""BERT checkpoints: Hugging Face's configuration and tensor names, and names for linear attention in its place."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flax import nnx

from lin_jax.attention import AttentionConfig
from lin_jax.errors import UserError
from lin_jax.hub.families.config_fields import ConfigFields
from lin_jax.hub.families.mixers import mixer_entries
from lin_jax.hub.families.tensor_names import plain_names, rooted
from lin_jax.hub.tensors import Entries, TensorEntry, fill, kernel, present, stacked, without_copy
from lin_jax.models.bert import Bert, BertClassifier, BertConfig, BertMaskedLM

PREFIX = "bert."
EMBEDDINGS = ("word", "position", "token_type")
# Tensors that may be there once more under a second name.
REPEATED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
# Heads that no model here has: they give way where one of its heads is asked for.
OTHER_HEADS = ("cls.seq_relationship.", "qa_outputs.")
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def config_from_huggingface(config: Mapping[str, Any], attention: AttentionConfig | None = None) -> BertConfig:
    """A BERT configuration from the contents of a `config.json`, with the given attention (default softmax).

    Raises:
        UserError: a size is missing, or an option has a value that this model does not have.
    """
    given = ConfigFields(config, "BERT", REQUIRED)
    for name, only in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if given.text(name, only) != only:
            raise UserError(f"{name} '{config[name]}' is not supported in a BERT; only '{only}' is")
    if given.flag("is_decoder", False):
        raise UserError("is_decoder 'True' is not supported in a BERT; only 'False' is")
    if not given.flag("tie_word_embeddings", True):
        raise UserError("tie_word_embeddings is false; a BERT with a head of its own is not supported")
    return BertConfig(
        vocab_size=given.size("vocab_size"),
        hidden_size=given.size("hidden_size"),
        intermediate_size=given.size("intermediate_size"),
        num_layers=given.size("num_hidden_layers"),
        num_heads=given.size("num_attention_heads"),
        max_positions=given.size("max_position_embeddings", 512),
        types=given.size("type_vocab_size", 2),
        norm_eps=given.number("layer_norm_eps", 1e-12),
        initializer_range=given.number("initializer_range", 0.02),
        attention=attention or AttentionConfig("softmax"),
        pad_token=given.token("pad_token_id", 0),
        num_labels=given.labels(),
    )


def config_to_huggingface(config: BertConfig, architecture: str = "BertForMaskedLM") -> dict[str, Any]:
    """The contents of a `config.json`; `architecture` is transformers' name of the model that has the configuration."""
    return {
        "model_type": "bert",
        "architectures": [architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": "gelu",
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.types,
        "layer_norm_eps": config.norm_eps,
        "initializer_range": config.initializer_range,
        "pad_token_id": config.pad_token,
        "id2label": {str(label): f"LABEL_{label}" for label in range(config.num_labels)},
        "label2id": {f"LABEL_{label}": label for label in range(config.num_labels)},
        "torch_dtype": config.param_dtype,
    }


def entries(model: Bert | BertMaskedLM | BertClassifier) -> Entries:
    """Entries of all tensors of a model, by name; in a model with a head, names of the encoder begin with `bert.`."""
    inside = () if isinstance(model, Bert) else ("bert",)
    config = model.config
    names = {
        f"embeddings.{kind}_embeddings.weight": TensorEntry(("embed", kind.split("_")[-1], "embedding"))
        for kind in EMBEDDINGS
    } | {
        **_norm("embeddings.LayerNorm", "embed", "norm"),
        **stacked(
            "encoder.layer", _layer(model, (*inside, "layers", "layers")), ("layers", "layers"), config.num_layers
        ),
        **_linear("pooler.dense", "pooler"),
    }
    if inside:
        names = {PREFIX + name: replace(entry, path=(*inside, *entry.path)) for name, entry in names.items()}
    if isinstance(model, BertClassifier):
        names |= _linear("classifier", "head")
    elif isinstance(model, BertMaskedLM):
        names |= {
            **_linear("cls.predictions.transform.dense", "transform"),
            **_norm("cls.predictions.transform.LayerNorm", "norm"),
            "cls.predictions.bias": TensorEntry(("bias",)),
        }
    return present(model, names)


def ignored(name: str) -> bool:
    """True for tensors that are not read: buffers, and heads of next-sentence prediction and question answering."""
    return name.startswith(OTHER_HEADS) or name.endswith(("embeddings.position_ids", "embeddings.token_type_ids"))


def own_tensors(model: Bert | BertMaskedLM | BertClassifier, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Selects the checkpoint's tensors for a model, under the model's names.

    An encoder alone may be read from a checkpoint with a head, and one without a pooler from one with it. The norms of
    old checkpoints have a `gamma` and a `beta`.
    """
    whole = rooted(plain_names(tensors), PREFIX, "embeddings.word_embeddings.weight", ("cls.", "classifier."))
    own = {_modern(name): tensor for name, tensor in whole.items() if not ignored(name)}
    for second, first in REPEATED.items():
        if second.endswith(".bias") and first not in own and second in own:
            own[first] = own.pop(second)  # The head's bias, which is one parameter under two names.
    for second, first in REPEATED.items():
        own = without_copy(own, second, first)
    if isinstance(model, Bert) and any(name.startswith(PREFIX) for name in own):
        own = {name.removeprefix(PREFIX): tensor for name, tensor in own.items() if name.startswith(PREFIX)}
    names = entries(model)
    unread = tuple(prefix for prefix in ("pooler.", "bert.pooler.") if prefix + "dense.weight" not in names)
    return {name: tensor for name, tensor in own.items() if not name.startswith(unread)}


def read_bert(model: Bert | BertMaskedLM | BertClassifier, tensors: Mapping[str, Any]) -> None:
    """Fills a model, which may be abstract, with named tensors.

    Raises:
        UserError: tensors are missing, unknown or of another shape; all of them are named at once.
    """
    fill(model, entries(model), own_tensors(model, tensors))


def _modern(name: str) -> str:
    return re.sub(r"gamma$", "weight", re.sub(r"beta$", "bias", name)) if "LayerNorm." in name else name


def _linear(name: str, *path: str) -> Entries:
    return {f"{name}.weight": kernel(*path), f"{name}.bias": TensorEntry((*path, "bias"))}


def _norm(name: str, *path: str) -> Entries:
    return {f"{name}.weight": TensorEntry((*path, "scale")), f"{name}.bias": TensorEntry((*path, "bias"))}


def _layer(model: nnx.Module, stack: tuple[str, ...]) -> Entries:
    return {
        **_linear("attention.self.query", "attention", "query"),
        **_linear("attention.self.key", "attention", "key"),
        **_linear("attention.self.value", "attention", "value"),
        **_linear("attention.output.dense", "attention", "out"),
        **_norm("attention.output.LayerNorm", "attention_norm"),
        **_linear("intermediate.dense", "up"),
        **_linear("output.dense", "down"),
        **_norm("output.LayerNorm", "feed_forward_norm"),
        **mixer_entries(model, stack, ("attention", "mixer"), "attention.self", centred=True),
    }
