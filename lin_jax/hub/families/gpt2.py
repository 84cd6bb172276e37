"""GPT-2 checkpoints: Hugging Face's configuration and tensor names, and the published names of its linear attention.

Linear layers are stored as `[in, out]`, as they are here.
"""

from collections.abc import Mapping
from typing import Any

from lin_jax.attention import AttentionConfig
from lin_jax.errors import UserError
from lin_jax.hub.families.config_fields import ConfigFields
from lin_jax.hub.families.mixers import layer_entries
from lin_jax.hub.families.tensor_names import plain_names, rooted
from lin_jax.hub.tensors import Entries, TensorEntry, fill, kernel, present, without_copy
from lin_jax.models import Gpt2, Gpt2Classifier, Gpt2Config

# Checkpoints of the trunk alone have names without it.
PREFIX = "transformer."
EMBEDDING, HEAD, SCORE = PREFIX + "wte.weight", "lm_head.weight", "score.weight"
TRUNK = {
    EMBEDDING: TensorEntry(("embed", "embedding")),
    PREFIX + "wpe.weight": TensorEntry(("embed_positions", "embedding")),
    PREFIX + "ln_f.weight": TensorEntry(("norm", "scale")),
    PREFIX + "ln_f.bias": TensorEntry(("norm", "bias")),
}
LAYER = {
    f"{name}.{part}": TensorEntry((*path, here))
    for name, path, parts in (
        ("ln_1", ("attention_norm",), ("scale", "bias")),
        ("ln_2", ("feed_forward_norm",), ("scale", "bias")),
        ("attn.c_attn", ("attention", "qkv"), ("kernel", "bias")),
        ("attn.c_proj", ("attention", "out"), ("kernel", "bias")),
        ("mlp.c_fc", ("feed_forward", "up"), ("kernel", "bias")),
        ("mlp.c_proj", ("feed_forward", "down"), ("kernel", "bias")),
    )
    for part, here in zip(("weight", "bias"), parts, strict=True)
}
# Buffers of old checkpoints, and a second convolution that the published code has and never calls.
UNUSED = (".attn.bias", ".attn.masked_bias", ".attn.dconv_ada2.weight")
REQUIRED = ("vocab_size", "n_embd", "n_layer", "n_head")
# Options that change the mathematics, and the only value that is supported.
FIXED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh")


def config_from_huggingface(config: Mapping[str, Any], attention: AttentionConfig | None = None) -> Gpt2Config:
    """A GPT-2 configuration from the contents of a `config.json`, with the given attention (default softmax).

    Raises:
        UserError: a size is missing, or an option has a value that this model does not have.
    """
    given = ConfigFields(config, "GPT-2", REQUIRED)
    activation = given.text("activation_function", ACTIVATIONS[0])
    if activation not in ACTIVATIONS:
        raise UserError(
            f"activation_function '{activation}' is not supported in a GPT-2; only {' and '.join(ACTIVATIONS)} are"
        )
    for name, value in FIXED.items():
        if given.flag(name, value) != value:
            raise UserError(f"{name} is {config[name]} in the configuration; only a GPT-2 with {value} is supported")
    return Gpt2Config(
        vocab_size=given.size("vocab_size"),
        hidden_size=given.size("n_embd"),
        intermediate_size=given.optional_size("n_inner"),
        num_layers=given.size("n_layer"),
        num_heads=given.size("n_head"),
        max_positions=given.size("n_positions", 1024),
        norm_eps=given.number("layer_norm_epsilon", 1e-5),
        tie_embeddings=given.flag("tie_word_embeddings", True),
        initializer_range=given.number("initializer_range", 0.02),
        num_labels=given.labels(),
        attention=attention or AttentionConfig(name="softmax"),
    )


def config_to_huggingface(config: Gpt2Config, architecture: str = "GPT2LMHeadModel") -> dict[str, Any]:
    """The contents of a `config.json`; `architecture` is transformers' name of the model that has the configuration."""
    return {
        "model_type": "gpt2",
        "architectures": [architecture],
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": ACTIVATIONS[0],
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "id2label": {str(label): f"LABEL_{label}" for label in range(config.num_labels)},
        "label2id": {f"LABEL_{label}": label for label in range(config.num_labels)},
        "torch_dtype": config.param_dtype,
    }


def entries(model: Gpt2 | Gpt2Classifier) -> Entries:
    """Entries of all tensors of a model, by name."""
    within = ("model",) if isinstance(model, Gpt2Classifier) else ()
    names = {name: entry.inside(*within) for name, entry in TRUNK.items()}
    stack, published = (*within, "layers"), {"alpha": "alpha", "taps": "dconv_ada.weight"}
    names |= layer_entries(model, LAYER, stack, PREFIX + "h", "attn", **published)
    return present(model, names | {HEAD: kernel("head"), SCORE: kernel("score")})


def ignored(name: str) -> bool:
    """True for tensors that are not read: buffers, and a convolution that is never used."""
    return name.endswith(UNUSED)


def own_tensors(model: Gpt2 | Gpt2Classifier, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Selects the checkpoint's tensors for a model, under its names: those of a trunk alone lack `transformer.`.

    Ignored tensors are left out, and so is a second copy of the embedding as a tied head.
    """
    whole = rooted(plain_names(tensors), PREFIX, "wte.weight", ("lm_head.", "score."))
    own = {name: tensor for name, tensor in whole.items() if not ignored(name)}
    untied = isinstance(model, Gpt2) and model.head is not None
    return own if untied else without_copy(own, HEAD, EMBEDDING)


def read_gpt2(model: Gpt2 | Gpt2Classifier, tensors: Mapping[str, Any]) -> None:
    """Fills a model, which may be abstract, with named tensors.

    Raises:
        UserError: tensors are missing, unknown or of another shape; all of them are named at once.
    """
    fill(model, entries(model), own_tensors(model, tensors))
