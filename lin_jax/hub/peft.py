"""LoRA adapters from and to PEFT folders: `adapter_config.json` and `adapter_model.safetensors`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lin_jax.errors import UserError
from lin_jax.hub.conversion.streams import KernelUpdate
from lin_jax.hub.families.registry import family_of_model
from lin_jax.hub.families.tensor_names import plain_names
from lin_jax.hub.files import listed, read_tensors, write_file
from lin_jax.hub.peft_config import CONFIG, read_adapter_config
from lin_jax.hub.save import atomic_folder
from lin_jax.hub.tensors import TensorEntry, is_finite
from lin_jax.models.lora import LowRankLinear, adapt, adapters

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# A name without the wrappers; an adapter's own, such as `default`, may stand before its end.
_NAME = re.compile(rf"(?:{re.escape(PREFIX)})?(?P<layer>.+)\.lora_(?P<letter>[AB])(?:\.[^.]+)?\.weight")


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

    Layers of a stack share a rank and a factor: those of lower rank are filled with zeros, other factors go into B.

    Raises:
        UserError: the folder cannot be read, holds another kind of adapter, or does not fit the model.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    places = {name: (path, layer) for path, names in _modules(model).items() for name, layer in names}
    pairs = _pairs(folder, places)
    ranks: dict[tuple[Any, ...], int] = {}
    for module in pairs:
        path = places[module][0]
        ranks[path] = max(ranks.get(path, 0), config.rank(module))
    adapted: dict[tuple[Any, ...], LowRankLinear] = {}
    for module, pair in pairs.items():
        path, layer = places[module]
        rank, factor = config.rank(module), config.factor(module)
        if path not in adapted:
            adapted[path] = adapt(model, path, ranks[path], factor * ranks[path], rngs=nnx.Rngs(0))
            if layer is not None:
                # Layers of a stack that the folder leaves out keep an update of zero.
                adapted[path].update.lora_b[...] = jnp.zeros_like(adapted[path].update.lora_b[...])
        update, own = adapted[path].update, factor / adapted[path].scale
        for letter, part, scale in (("A", update.lora_a, 1.0), ("B", update.lora_b, own)):
            shape = part.shape if layer is None else part.shape[1:]
            matrix = _matrix(folder, module, letter, pair[letter], shape, rank, ranks[path])
            value = jnp.asarray(matrix if scale == 1 else matrix * np.float64(scale), part.dtype)
            part[...] = value if layer is None else part[...].at[layer].set(value)


def adapter_updates(model: nnx.Module, folder: str | Path) -> dict[tuple[Any, ...], KernelUpdate]:
    """Updates that the adapters of a PEFT folder add to a model's kernels, by the paths of these.

    Args:
        model: the model, which may be abstract, and is what it was afterwards.
        folder: the folder.

    Raises:
        UserError: the folder cannot be read, holds another kind of adapter, or does not fit the model.
    """
    load_adapters(model, folder)
    found = {}
    for path, adapter in adapters(model).items():
        holder: Any = model
        for part in path[:-1]:
            holder = getattr(holder, part)
        setattr(holder, path[-1], adapter.base)
        down, up = (np.asarray(part[...], np.float64) for part in (adapter.update.lora_a, adapter.update.lora_b))
        found[(*path, "kernel")] = KernelUpdate(adapter.scale, down, up)
    return found


def _matrix(
    folder: Path, module: str, letter: str, tensor: Any, shape: tuple[int, ...], rank: int, widest: int
) -> np.ndarray:
    """One matrix of an adapter as the model has it, with zeros up to the rank of the widest in its stack."""
    axis = 1 if letter == "A" else 0
    expected = tuple(rank if place == axis else size for place, size in enumerate(shape))
    if tuple(tensor.shape) != expected[::-1]:
        raise UserError(
            f"{folder}: lora_{letter} of {module} has shape {tuple(tensor.shape)}, the model expects {expected[::-1]}; "
            "give adapters of this model"
        )
    matrix = np.asarray(tensor).T
    if not is_finite(matrix):
        raise UserError(f"{folder}: lora_{letter} of {module} holds NaN or infinity; give the adapters before that")
    return np.pad(matrix, [(0, widest - rank if place == axis else 0) for place in range(2)])


def _modules(model: nnx.Module) -> dict[tuple[Any, ...], list[tuple[str, int | None]]]:
    """Names of linear layers in a checkpoint, each with its index in the stack, by the path of the parameter."""
    plain = nnx.eval_shape(lambda: type(model)(model.config, rngs=nnx.Rngs(0)))
    found: dict[tuple[Any, ...], list[tuple[str, int | None]]] = {}
    entries: Mapping[str, TensorEntry] = family_of_model(model).entries(plain)
    for name, entry in entries.items():
        if entry.path[-1] == "kernel" and name.endswith(".weight"):
            found.setdefault(entry.path[:-1], []).append((name.removesuffix(".weight"), entry.layer))
    return found


def _pairs(folder: Path, places: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Matrices A and B, which are not read yet, by the name of the layer in the model that they belong to."""
    pairs: dict[str, dict[str, Any]] = {}
    unknown = set()
    for name, tensor in plain_names(open_adapters(folder)).items():
        found = _NAME.fullmatch(name)
        layer = None if found is None else _layer(found["layer"], places)
        if found is None or layer is None or found["letter"] in pairs.get(layer, {}):
            unknown.add(name.removeprefix(PREFIX) if found is None else found["layer"])
        else:
            pairs.setdefault(layer, {})[found["letter"]] = tensor
    unknown |= {layer for layer, pair in pairs.items() if len(pair) < 2}
    if unknown:
        raise UserError(
            f"{folder}: the model has no layer, or the folder no pair A and B, for {listed(sorted(unknown))}; give "
            "adapters of this model"
        )
    return pairs


def _layer(name: str, places: Mapping[str, Any]) -> str | None:
    """The layer of a name that may lack the beginning of ours, or have more in front of it."""
    if name in places:
        return name
    near = [each for each in places if each.endswith(f".{name}") or name.endswith(f".{each}")]
    return near[0] if len(near) == 1 else None


def open_adapters(folder: Path) -> dict[str, Any]:
    """Opens the tensors of a PEFT folder, by name; none of them is read yet.

    Raises:
        UserError: the folder holds none, or only a pickle.
    """
    if not (folder / TENSORS).is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(
            f"{folder} holds its adapters only as adapter_model.bin, a pickle, which can run code and is never read; "
            "convert it with PEFT: from_pretrained, then save_pretrained"
        )
    return dict(read_tensors([folder / TENSORS]))
