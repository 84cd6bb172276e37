"""LoRA adapters from and to PEFT folders: `adapter_config.json` and `adapter_model.safetensors`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file

from lin_jax.errors import UserError
from lin_jax.hub.families.registry import family_of_model
from lin_jax.hub.files import write_file
from lin_jax.hub.save import atomic_folder
from lin_jax.hub.tensors import TensorEntry
from lin_jax.models.lora import LowRankLinear, adapt, adapters

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# PEFT's options that are not supported, with the value that turns each of them off.
_UNSUPPORTED: dict[str, Any] = {
    "use_dora": False,
    "use_rslora": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": [],
}


def save_adapters(model: nnx.Module, folder: str | Path, *, base: str, overwrite: bool = False) -> Path:
    """Writes a model's adapters, and nothing else, as a PEFT folder; it appears whole, at the end.

    Args:
        model: a model with adapters.
        folder: the folder to write.
        base: folder or name of the checkpoint that the adapters belong to.
        overwrite: replace the content of the folder.

    Raises:
        UserError: the model has no adapters, or the folder is not empty.
    """
    found = adapters(model)
    if not found:
        raise UserError("the model has no adapters; add them with add_lora, or save it with save_pretrained")
    modules = _modules(model)
    tensors, first = {}, next(iter(found.values()))
    for path, adapter in found.items():
        for name, layer in modules[path]:
            for letter, part in (("A", adapter.update.lora_a), ("B", adapter.update.lora_b)):
                matrix = np.asarray(part[...] if layer is None else part[layer])
                tensors[f"{PREFIX}{name}.lora_{letter}.weight"] = np.ascontiguousarray(matrix.T)
    rank = first.update.lora_a.shape[-1]
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": first.scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": family_of_model(model).name == "gpt2",
        "target_modules": [name for path in found for name, _ in modules[path]],
        "inference_mode": True,
    }
    with atomic_folder(Path(folder), overwrite=overwrite) as partial:
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_file(tensors, partial / TENSORS)
    return Path(folder)


def load_adapters(model: nnx.Module, folder: str | Path) -> None:
    """Adds the adapters of a PEFT folder to a model, in place; `models.lora.merge_lora` then merges them into it.

    Raises:
        UserError: the folder cannot be read, holds another kind of adapter, or does not fit the model.
    """
    config, tensors = _read(Path(folder))
    places = {name: (path, layer) for path, names in _modules(model).items() for name, layer in names}
    named: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        module, _, letter = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        named.setdefault(module, {})[letter] = tensor
    unknown = sorted(module for module, pair in named.items() if module not in places or set(pair) != {"A", "B"})
    if unknown:
        raise UserError(
            f"{folder}: the model has no layer, or the folder no pair A and B, for {', '.join(unknown)}; give adapters "
            "of this model"
        )
    adapted: dict[tuple[Any, ...], LowRankLinear] = {}
    for module, pair in named.items():
        path, layer = places[module]
        if path not in adapted:
            # Layers of a stack that the folder leaves out keep an update of zero.
            adapted[path] = adapt(model, path, config["r"], config["lora_alpha"], rngs=nnx.Rngs(0))
        for letter, part in (("A", adapted[path].update.lora_a), ("B", adapted[path].update.lora_b)):
            matrix, expected = pair[letter].T, part.shape if layer is None else part.shape[1:]
            if matrix.shape != expected:
                found, right = matrix.shape[::-1], expected[::-1]
                raise UserError(
                    f"{folder}: lora_{letter} of {module} has shape {found}, the model expects {right}; give adapters "
                    "of this model"
                )
            value = jnp.asarray(matrix, part.dtype)
            part[...] = value if layer is None else part[...].at[layer].set(value)


def _modules(model: nnx.Module) -> dict[tuple[Any, ...], list[tuple[str, int | None]]]:
    """Names of linear layers in a checkpoint, each with its index in the stack, by the path of the parameter."""
    plain = nnx.eval_shape(lambda: type(model)(model.config, rngs=nnx.Rngs(0)))
    found: dict[tuple[Any, ...], list[tuple[str, int | None]]] = {}
    entries: Mapping[str, TensorEntry] = family_of_model(model).entries(plain)
    for name, entry in entries.items():
        if entry.path[-1] == "kernel" and name.endswith(".weight"):
            found.setdefault(entry.path[:-1], []).append((name.removesuffix(".weight"), entry.layer))
    return found


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be read as adapters ({error}); give a PEFT folder") from None
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder}: peft_type '{config.get('peft_type')}' is not supported; give 'LORA' adapters")
    for option, plain in _UNSUPPORTED.items():
        if config.get(option) not in (None, plain):
            raise UserError(f"{folder}: {option} {config[option]!r} is not supported; give plain LoRA")
    return config, tensors
