"""Medusa heads in the published layout: a file `medusa_lm_head.safetensors` and two numbers in a `config.json`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lin_jax.errors import UserError
from lin_jax.hub.files import read_config, read_tensors, write_file
from lin_jax.hub.tensors import Entries, Entry, fill, named, transpose
from lin_jax.models import MedusaHeads

HEADS_FILE = "medusa_lm_head.safetensors"
# Of one head M: `M.0` is its residual block, `M.1` its way to the vocabulary.
HEAD = {
    "0.linear.weight": Entry(("weight",), transpose, transpose),
    "0.linear.bias": Entry(("bias",)),
    "1.weight": Entry(("output",), transpose, transpose),
}


def entries(heads: MedusaHeads) -> Entries:
    """Every tensor of the heads, by name."""
    return {f"{m}.{name}": entry.of_layer((), m) for m in range(heads.count) for name, entry in HEAD.items()}


def read_heads(heads: MedusaHeads, tensors: Mapping[str, Any]) -> None:
    """Fills heads, which may be ones of shapes, with named tensors.

    Raises:
        UserError: tensors are missing, unknown or of another shape; all of them are named at once.
    """
    fill(heads, entries(heads), tensors)


def write_heads(heads: MedusaHeads) -> dict[str, np.ndarray]:
    """Named tensors of heads."""
    return named(nnx.state(heads, nnx.Param), entries(heads))


def has_heads(folder: Path) -> bool:
    """Whether a folder holds heads in the published layout."""
    return (folder / HEADS_FILE).is_file()


def load_heads(folder: Path, model: Any) -> MedusaHeads:
    """The heads that lie in a folder, for a model.

    Raises:
        UserError: there are none, they have another form than ours, or they do not fit the model.
    """
    about = read_config(folder)
    count, layers = about.get("medusa_num_heads"), about.get("medusa_num_layers", 1)
    if not has_heads(folder) or not isinstance(count, int):
        raise UserError(f"{folder} holds no Medusa heads: it needs {HEADS_FILE} and medusa_num_heads in config.json")
    if layers != 1:
        raise UserError(f"the heads in {folder} have medusa_num_layers {layers}; only heads with 1 are supported")
    config = model.config
    sizes = (count, config.hidden_size, config.vocab_size)
    heads = nnx.eval_shape(lambda: MedusaHeads(*sizes, dtype=jnp.dtype(config.param_dtype)))
    read_heads(heads, read_tensors([folder / HEADS_FILE]))
    return heads


def save_heads(heads: MedusaHeads, folder: Path) -> None:
    """Writes heads beside a model whose `config.json` is in the folder."""
    write_file(write_heads(heads), folder / HEADS_FILE)
    path = folder / "config.json"
    about = json.loads(path.read_text()) | {"medusa_num_heads": heads.count, "medusa_num_layers": 1}
    path.write_text(json.dumps(about, indent=2) + "\n")
