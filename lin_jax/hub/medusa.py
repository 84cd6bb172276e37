"""Medusa heads in the published format: a file `medusa_lm_head.safetensors` and two numbers in a `config.json`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lin_jax.errors import UserError
from lin_jax.hub.conversion.streams import streams
from lin_jax.hub.conversion.tensor_file import write_file
from lin_jax.hub.files import Tensors, read_config, read_tensors
from lin_jax.hub.tensors import Entries, TensorEntry, fill, named, transpose
from lin_jax.models import MedusaHeads

HEADS_FILE = "medusa_lm_head.safetensors"
# Of one head M: `M.0` is its residual block, `M.1` its projection to the vocabulary.
HEAD = {
    "0.linear.weight": TensorEntry(("weight",), transpose, transpose),
    "0.linear.bias": TensorEntry(("bias",)),
    "1.weight": TensorEntry(("output",), transpose, transpose),
}


def entries(heads: MedusaHeads) -> Entries:
    """Entries of all tensors of the heads, by name."""
    return {f"{m}.{name}": entry.of_layer((), m) for m in range(heads.count) for name, entry in HEAD.items()}


def read_heads(heads: MedusaHeads, tensors: Mapping[str, Any]) -> None:
    """Fills heads, which may be abstract, with named tensors.

    Raises:
        UserError: tensors are missing, unknown or of another shape; all of them are named at once.
    """
    fill(heads, entries(heads), tensors)


def write_heads(heads: MedusaHeads) -> dict[str, np.ndarray]:
    """Named tensors of heads."""
    return named(nnx.state(heads, nnx.Param), entries(heads))


def has_heads(folder: Path) -> bool:
    """True if a folder holds heads in the published format."""
    return (folder / HEADS_FILE).is_file()


def load_medusa_heads(folder: Path, model: Any) -> MedusaHeads:
    """Loads the heads of a folder, for a model.

    Raises:
        UserError: the folder has no heads, they have more than one layer, or they do not fit the model.
    """
    heads, tensors = open_heads(folder, model)
    read_heads(heads, tensors)
    return heads


def open_heads(folder: Path, model: Any) -> tuple[MedusaHeads, Tensors]:
    """Opens the heads of a folder, for a model, which may be abstract: abstract heads, and tensors yet to be read.

    Raises:
        UserError: the folder has no heads, or they have more than one layer.
    """
    hf_config = read_config(folder)
    count, layers = hf_config.get("medusa_num_heads"), hf_config.get("medusa_num_layers", 1)
    if not has_heads(folder) or not isinstance(count, int):
        raise UserError(
            f"{folder} holds no Medusa heads; give one with {HEADS_FILE} and medusa_num_heads in config.json"
        )
    if layers != 1:
        raise UserError(
            f"the heads in {folder} have medusa_num_layers {layers}; give heads with 1, the only supported number"
        )
    config = model.config
    sizes = (count, config.hidden_size, config.vocab_size)
    heads = nnx.eval_shape(lambda: MedusaHeads(*sizes, dtype=jnp.dtype(config.param_dtype)))
    return heads, read_tensors([folder / HEADS_FILE])


def save_heads(heads: MedusaHeads, folder: Path) -> None:
    """Writes heads into the folder of their model, and their numbers into its `config.json`."""
    write_file(streams(heads, entries(heads), {}), folder / HEADS_FILE)
    note_heads(heads, folder)


def note_heads(heads: MedusaHeads, folder: Path) -> None:
    """Writes the numbers of heads, which may be abstract, into the `config.json` of their model."""
    path = folder / "config.json"
    hf_config = json.loads(path.read_text()) | {"medusa_num_heads": heads.count, "medusa_num_layers": 1}
    path.write_text(json.dumps(hf_config, indent=2) + "\n")
