"""T5 checkpoints: Hugging Face's configuration and tensor names, and the published names of its linear attention."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from lin_jax.attention import AttentionConfig
from lin_jax.attention.registry import REGISTRY, parse_name
from lin_jax.hub.families.config_fields import ConfigFields
from lin_jax.hub.families.mixers import mixer_entries
from lin_jax.hub.families.tensor_names import plain_names
from lin_jax.hub.tensors import Entries, TensorEntry, fill, kernel, present, stacked, without_copy
from lin_jax.models.t5.config import T5Config
from lin_jax.models.t5.model import T5, T5Classifier

EMBEDDING, HEAD = "shared.weight", "lm_head.weight"
CLASSIFIER_PREFIX = "transformer."
# Tensors that may be there once more under a second name.
COPIES = {name: EMBEDDING for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")}
REPEATED = {
    HEAD: EMBEDDING,
    **COPIES,
    **{CLASSIFIER_PREFIX + name: CLASSIFIER_PREFIX + first for name, first in COPIES.items()},
}
TRUNK = {
    EMBEDDING: TensorEntry(("embed", "embedding")),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": TensorEntry(("encoder", "bias", "table")),
    "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": TensorEntry(("decoder", "bias", "table")),
    "encoder.final_layer_norm.weight": TensorEntry(("encoder", "norm", "scale")),
    "decoder.final_layer_norm.weight": TensorEntry(("decoder", "norm", "scale")),
}
CLASSIFICATION_HEAD = {
    f"classification_head.{name}.{part}": entry
    for name, path in (("dense", "dense"), ("out_proj", "out"))
    for part, entry in (("weight", kernel(path)), ("bias", TensorEntry((path, "bias"))))
}
REQUIRED = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")


def config_from_huggingface(config: Mapping[str, Any], attention: AttentionConfig | None = None) -> T5Config:
    """A T5 configuration from the contents of a `config.json`.

    The given attention (default softmax) is that of the encoder and the decoder, and of the cross attention if it has
    that form; otherwise the cross attention is softmax.

    Raises:
        UserError: a size is missing, or an option has a value that this model does not have.
    """
    given = ConfigFields(config, "T5", REQUIRED)
    attention = attention or AttentionConfig("softmax")
    has_cross = "cross" in REGISTRY[parse_name(attention.name).base].forms
    tied = given.flag("tie_word_embeddings", True)
    return T5Config(
        vocab_size=given.size("vocab_size"),
        hidden_size=given.size("d_model"),
        head_dim=given.size("d_kv"),
        intermediate_size=given.size("d_ff"),
        num_layers=given.size("num_layers"),
        num_decoder_layers=given.optional_size("num_decoder_layers"),
        num_heads=given.size("num_heads"),
        feed_forward=given.text("feed_forward_proj", "relu"),  # type: ignore[arg-type]  # T5Config checks it
        buckets=given.size("relative_attention_num_buckets", 32),
        max_distance=given.size("relative_attention_max_distance", 128),
        norm_eps=given.number("layer_norm_epsilon", 1e-6),
        # transformers 5 writes that all models are tied, and here whether their heads read scaled vectors.
        tie_embeddings=tied and given.flag("scale_decoder_outputs", True),
        initializer_factor=given.number("initializer_factor", 1.0),
        encoder_attention=attention,
        decoder_attention=attention,
        cross_attention=attention if has_cross else AttentionConfig("softmax"),
        pad_token=given.token("pad_token_id", 0),
        end_token=given.token("eos_token_id", 1),
        decoder_start_token=given.token("decoder_start_token_id", 0),
        num_labels=given.labels(),
    )


def config_to_huggingface(config: T5Config, architecture: str = "T5ForConditionalGeneration") -> dict[str, Any]:
    """The contents of a `config.json`; `architecture` is transformers' name of the model that has the configuration."""
    return {
        "model_type": "t5",
        "architectures": [architecture],
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "d_kv": config.head_dim,
        "d_ff": config.intermediate_size,
        "num_layers": config.num_layers,
        "num_decoder_layers": config.decoder_layers,
        "num_heads": config.num_heads,
        "feed_forward_proj": config.feed_forward,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_factor": config.initializer_factor,
        "pad_token_id": config.pad_token,
        "eos_token_id": config.end_token,
        "decoder_start_token_id": config.decoder_start_token,
        "id2label": {str(label): f"LABEL_{label}" for label in range(config.num_labels)},
        "label2id": {f"LABEL_{label}": label for label in range(config.num_labels)},
        "torch_dtype": config.param_dtype,
    }


def entries(model: T5 | T5Classifier) -> Entries:
    """Entries of all tensors of a model, by name."""
    encoder, decoder = (("encoder", "layers", "layers"), ("decoder", "layers", "layers"))
    names = (
        TRUNK
        | stacked("encoder.block", _encoder_layer(model, encoder), encoder, model.config.num_layers)
        | stacked("decoder.block", _decoder_layer(model, decoder), decoder, model.config.decoder_layers)
    )
    if isinstance(model, T5Classifier):
        names = {CLASSIFIER_PREFIX + name: entry for name, entry in names.items()} | CLASSIFICATION_HEAD
    return present(model, names | {HEAD: kernel("head")})


def ignored(name: str) -> bool:
    """True for tensors that are not read: constants, and tensors that no T5 uses."""
    return name.endswith(
        (".conv_mask", ".EncDecAttention.dwconv.weight", ".EncDecAttention.relative_attention_bias.weight")
    )


def own_tensors(model: T5 | T5Classifier, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Selects the checkpoint's tensors for a model, under its names: those of a classifier begin with `transformer.`.

    The embedding may be there under several names.
    """
    own = {name: tensor for name, tensor in plain_names(tensors).items() if not ignored(name)}
    if not isinstance(model, T5Classifier):
        own = {name.removeprefix(CLASSIFIER_PREFIX): tensor for name, tensor in own.items()}
    elif not any(name.startswith(CLASSIFIER_PREFIX) for name in own):
        own = {name if name in CLASSIFICATION_HEAD else CLASSIFIER_PREFIX + name: own[name] for name in own}
    names = entries(model)
    embedding = next(name for name in names if name.endswith(EMBEDDING))
    prefix = embedding.removesuffix(EMBEDDING)
    # Either part's own copy may be the only one; the head, which may be another matrix, never stands for it.
    copies = [prefix + name for name in COPIES if prefix + name in own]
    if embedding not in own and copies:
        own[embedding] = own.pop(copies[0])
    for second, first in REPEATED.items():
        if second not in names:
            own = without_copy(own, second, first)
    return own


def read_t5(model: T5 | T5Classifier, tensors: Mapping[str, Any]) -> None:
    """Fills a model, which may be abstract, with named tensors.

    Raises:
        UserError: tensors are missing, unknown or of another shape; all of them are named at once.
    """
    fill(model, entries(model), own_tensors(model, tensors))


def _attention(model: nnx.Module, stack: tuple[str, ...], path: str, prefix: str, *, centred: bool = False) -> Entries:
    projections = {"q": "query", "k": "key", "v": "value", "o": "out"}
    names = {f"{prefix}.{there}.weight": kernel(path, here) for there, here in projections.items()}
    return names | mixer_entries(model, stack, (path, "mixer"), prefix, alpha="alpha", centred=centred)


def _feed_forward(config: T5Config, prefix: str) -> Entries:
    projections = {"wi": "up"} if config.feed_forward == "relu" else {"wi_0": "gate", "wi_1": "up"}
    names = {
        f"{prefix}.DenseReluDense.{there}.weight": kernel("feed_forward", here)
        for there, here in (projections | {"wo": "down"}).items()
    }
    return names | {f"{prefix}.layer_norm.weight": TensorEntry(("feed_forward_norm", "scale"))}


def _encoder_layer(model: T5 | T5Classifier, stack: tuple[str, ...]) -> Entries:
    return {
        "layer.0.layer_norm.weight": TensorEntry(("attention_norm", "scale")),
        **_attention(model, stack, "attention", "layer.0.SelfAttention", centred=True),
        **_feed_forward(model.config, "layer.1"),
    }


def _decoder_layer(model: T5 | T5Classifier, stack: tuple[str, ...]) -> Entries:
    return {
        "layer.0.layer_norm.weight": TensorEntry(("attention_norm", "scale")),
        **_attention(model, stack, "attention", "layer.0.SelfAttention"),
        "layer.1.layer_norm.weight": TensorEntry(("cross_norm", "scale")),
        **_attention(model, stack, "cross", "layer.1.EncDecAttention"),
        **_feed_forward(model.config, "layer.2"),
    }
