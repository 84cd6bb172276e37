"""LLaMA checkpoints: Hugging Face's configuration and tensor names, and the published names of its linear attention.

The convolution is stored as `dwconv.weight` `[H, 1, K, 1]`, a centred kernel in which tap j sees `v[t + j - K // 2]`;
of it only the half that looks back is read. The grouped branch's factor is stored as `global_factor` `[1]`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lin_jax.attention import AttentionConfig
from lin_jax.errors import UserError
from lin_jax.models import Llama, LlamaConfig, MedusaHeads, RotaryConfig


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _transpose(array: np.ndarray) -> np.ndarray:
    return array.T


def _taps(kernel: np.ndarray) -> np.ndarray:
    """Taps `[H, W]`, lag 0 first, of a centred kernel `[H, 1, K, 1]`."""
    return kernel[:, 0, kernel.shape[2] // 2 :: -1, 0]


def _kernel(taps: np.ndarray) -> np.ndarray:
    """The centred kernel `[H, 1, 2W-1, 1]` with its future half zero."""
    heads, width = taps.shape
    kernel = np.zeros((heads, 1, 2 * width - 1, 1), taps.dtype)
    kernel[:, 0, :width, 0] = taps[:, ::-1]
    return kernel


@dataclass(frozen=True)
class Entry:
    """Where a tensor lives in the model, and how it is turned on the way in and out."""

    path: tuple[str, ...]
    read: Callable[[np.ndarray], np.ndarray] = _same
    write: Callable[[np.ndarray], np.ndarray] = _same


def _kernel_entry(*path: str) -> Entry:
    return Entry((*path, "kernel"), _transpose, _transpose)


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOP = {
    EMBEDDING: Entry(("embed", "embedding")),
    "model.norm.weight": Entry(("norm", "scale")),
    HEAD: _kernel_entry("head"),
}
LAYER = {
    "input_layernorm.weight": Entry(("attention_norm", "scale")),
    "post_attention_layernorm.weight": Entry(("feed_forward_norm", "scale")),
    "self_attn.q_proj.weight": _kernel_entry("attention", "query"),
    "self_attn.k_proj.weight": _kernel_entry("attention", "key"),
    "self_attn.v_proj.weight": _kernel_entry("attention", "value"),
    "self_attn.o_proj.weight": _kernel_entry("attention", "out"),
    "self_attn.global_factor": Entry(("attention", "mixer", "alpha")),
    "self_attn.dwconv.weight": Entry(("attention", "mixer", "convolution", "taps"), _taps, _kernel),
    "mlp.gate_proj.weight": _kernel_entry("feed_forward", "gate"),
    "mlp.up_proj.weight": _kernel_entry("feed_forward", "up"),
    "mlp.down_proj.weight": _kernel_entry("feed_forward", "down"),
}
HEADS = {
    "0.linear.weight": Entry(("weight",), _transpose, _transpose),
    "0.linear.bias": Entry(("bias",)),
    "1.weight": Entry(("output",), _transpose, _transpose),
}


REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def config_from_huggingface(config: Mapping[str, Any], attention: AttentionConfig | None = None) -> LlamaConfig:
    """A LLaMA configuration from the contents of a `config.json`, with the given attention (default softmax).

    Raises:
        UserError: a size is missing, or an option is set that this model does not have.
    """
    missing = [name for name in REQUIRED if name not in config]
    if missing:
        raise UserError(f"the configuration has no {', '.join(missing)}; give the config.json of a LLaMA")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act '{config['hidden_act']}' is not supported in a LLaMA; only 'silu' is")
    for option in ("attention_bias", "mlp_bias"):
        if config.get(option):
            raise UserError(f"{option} is set in the configuration; a LLaMA with biases is not supported")
    return LlamaConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config.get("num_key_value_heads"),
        head_dim=config.get("head_dim"),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tie_embeddings=config.get("tie_word_embeddings", False),
        rotary=rotary_from_huggingface(config),
        attention=attention or AttentionConfig(name="softmax"),
    )


def rotary_from_huggingface(config: Mapping[str, Any]) -> RotaryConfig:
    """Rotary options from `rope_parameters`, or from the older `rope_theta` and `rope_scaling`."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    beside = {name: config.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    options = {name: value for part in (beside, given) for name, value in part.items() if value is not None}
    theta = options.pop("rope_theta", 10000.0)
    scaling = options.pop("rope_type", options.pop("type", "default"))
    trained = config.get("max_position_embeddings", 2048)
    original = options.pop("original_max_position_embeddings", trained)
    if scaling == "dynamic":
        original = trained  # In the dynamic scaling the limit is the pretraining length itself.
    elif scaling in ("llama3", "yarn", "longrope"):
        original = config.get("original_max_position_embeddings") or original
    if scaling == "default":
        options.pop("partial_rotary_factor", None)  # Hugging Face's LLaMA does not heed it either.
    if options.get("factor") is None:
        options["factor"] = 1.0 if scaling in ("default", "proportional") else trained / original
    for name in ("short_factor", "long_factor"):
        if options.get(name) is not None:
            options[name] = tuple(options[name])
    unknown = sorted(set(options) - set(RotaryConfig.__dataclass_fields__))
    if unknown:
        raise UserError(f"rotary option '{unknown[0]}' in the configuration is unknown")
    return RotaryConfig(theta, scaling, original_context_length=original, context_length=trained, **options)


def read_llama(model: Llama, tensors: Mapping[str, np.ndarray]) -> None:
    """Fills a model, which may be one of shapes, with named tensors.

    Two kinds of tensors may be there beside the model's own: the embedding once more as a tied head, and the rotary
    frequencies that old checkpoints hold.

    Raises:
        UserError: tensors are missing, unknown or of another shape; all of them are named at once.
    """
    own = {name: tensor for name, tensor in tensors.items() if not name.endswith(".rotary_emb.inv_freq")}
    if model.head is None and np.array_equal(own.get(HEAD, ()), own.get(EMBEDDING, ())):
        own.pop(HEAD, None)
    _read(model, _entries(model), own)


def read_heads(heads: MedusaHeads, tensors: Mapping[str, np.ndarray]) -> None:
    """Like `read_llama`, for Medusa heads: tensors named `M.0.linear.weight`, `M.0.linear.bias` and `M.1.weight`."""
    entries: Entries = {f"{m}.{name}": (entry, m) for m in range(heads.count) for name, entry in HEADS.items()}
    _read(heads, entries, tensors)


def write_llama(state: nnx.State, model: Llama) -> dict[str, np.ndarray]:
    """Named tensors of a state that is shaped like the model's parameters (the parameters, or their gradients)."""
    flat = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}
    return {
        name: np.ascontiguousarray(entry.write(flat[entry.path] if layer is None else flat[entry.path][layer]))
        for name, (entry, layer) in _entries(model).items()
    }


Entries = dict[str, tuple[Entry, int | None]]


def _entries(model: Llama) -> Entries:
    """Every tensor that this model has, by name: its entry and, for layers, the layer's number."""
    present = {path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    entries: Entries = {name: (entry, None) for name, entry in TOP.items() if entry.path in present}
    for name, entry in LAYER.items():
        path = ("layers", "layers", *entry.path)
        if path in present:
            for layer in range(model.config.num_layers):
                entries[f"model.layers.{layer}.{name}"] = (Entry(path, entry.read, entry.write), layer)
    return entries


def _read(module: nnx.Module, entries: Entries, tensors: Mapping[str, np.ndarray]) -> None:
    params = dict(nnx.to_flat_state(nnx.state(module, nnx.Param)))
    paths = {entry.path for entry, _ in entries.values()}
    flat = {path: np.empty(params[path].shape, params[path].dtype) for path in paths}
    problems = [f"{name} is missing" for name in entries if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in entries]
    for name, (entry, index) in entries.items():
        if name not in tensors:
            continue
        tensor = np.asarray(tensors[name])
        target = flat[entry.path] if index is None else flat[entry.path][index]
        expected = entry.write(target).shape
        if tensor.shape != expected:
            problems.append(f"{name} has shape {tensor.shape}, the model expects {expected}")
        else:
            target[...] = entry.read(tensor)
    if problems:
        raise UserError("tensors do not fit the model: " + "; ".join(problems))
    nnx.update(module, nnx.from_flat_state([(path, nnx.Param(jnp.asarray(array))) for path, array in flat.items()]))
