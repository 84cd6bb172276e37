"""Models from Hugging Face folders: `from_pretrained` builds a model, checks it and fills it, tensor by tensor."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from lin_jax.errors import UserError
from lin_jax.hub.config_json import Attentions, family_of, model_config
from lin_jax.hub.families.registry import Family
from lin_jax.hub.files import find_checkpoint, read_checkpoint, read_config
from lin_jax.hub.llama2c import read_llama2c
from lin_jax.hub.tensors import Entries, ShardingFn, fill, mismatches
from lin_jax.models.compute import DTYPES, ComputeConfig


@dataclass(frozen=True)
class HubCheckpoint:
    """`config.json` and headers of the tensors of a checkpoint; no tensor is read yet.

    Attributes:
        folder: its folder; a file, if it is one of llama2.c.
        hf_config: contents of its `config.json`.
        tensors: tensors that are read when they are used, by name.
    """

    folder: Path
    hf_config: dict[str, Any]
    tensors: Mapping[str, Any]

    @classmethod
    def open(cls, name_or_path: str | Path) -> "HubCheckpoint":
        """Opens a folder, `owner/name` on the Hub, or a file in llama2.c's first format.

        Raises:
            UserError: there is no such checkpoint, or it is damaged.
        """
        path = Path(name_or_path).expanduser()
        if path.is_file():
            return cls(path, *read_llama2c(path))
        folder = find_checkpoint(name_or_path)
        return cls(folder, read_config(folder), read_checkpoint(folder))


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint that is opened and not yet read.

    Attributes:
        folder: its folder; of llama2.c, its file.
        hf_config: contents of its `config.json`.
        family: its model family.
        model: the model, abstract.
        entries: the model's tensors that are to be read, by name.
        tensors: the checkpoint's tensors for this model, by name.
        adds: paths of variables that another attention or head than the folder's adds; they are initialised.
    """

    folder: Path
    hf_config: dict[str, Any]
    family: Family
    model: Any
    entries: Entries
    tensors: Mapping[str, Any]
    adds: frozenset[tuple[Any, ...]]

    @classmethod
    def open(
        cls,
        name_or_path: str | Path,
        *,
        attention: Attentions | None = None,
        dtype: str | None = None,
        param_dtype: str | None = None,
        head: str | None = None,
    ) -> "Pretrained":
        """Opens a folder; the arguments are those of `from_pretrained`."""
        return cls._of(HubCheckpoint.open(name_or_path), attention, dtype, param_dtype, head)

    @classmethod
    def of(
        cls,
        checkpoint: HubCheckpoint,
        *,
        attention: Attentions | None = None,
        compute: ComputeConfig | None = None,
        head: str | None = None,
    ) -> "Pretrained":
        """Builds the model of an opened checkpoint.

        Args:
            checkpoint: the checkpoint.
            attention: as in `from_pretrained`.
            compute: types of numbers; None takes what is stored.
            head: as in `from_pretrained`.
        """
        dtype, param_dtype = (None, None) if compute is None else (compute.dtype, compute.param_dtype)
        return cls._of(checkpoint, attention, dtype, param_dtype, head)

    @classmethod
    def _of(
        cls,
        checkpoint: HubCheckpoint,
        attention: Attentions | None,
        dtype: str | None,
        param_dtype: str | None,
        head: str | None,
    ) -> "Pretrained":
        folder, hf_config, tensors = checkpoint.folder, checkpoint.hf_config, checkpoint.tensors
        family = family_of(hf_config)
        config = model_config(family, hf_config, attention)
        param_dtype = param_dtype or stored_type(tensors)
        config = replace(config, param_dtype=param_dtype, dtype=dtype or param_dtype)
        _check_precision(config)
        own_head = family.head_for(None, hf_config.get("architectures"))
        chosen = own_head if head is None else family.head_for(head, None)
        model = abstract(chosen.model, config)
        entries = family.entries(model)
        own: Mapping[str, Any] = family.own_tensors(model, tensors)
        adds: frozenset[tuple[Any, ...]] = frozenset()
        if attention is not None or chosen != own_head:
            there = family.entries(abstract(own_head.model, model_config(family, hf_config)))
            expected = set(family.own_tensors(model, {name: np.asarray(number) for number, name in enumerate(there)}))
            adds = _added(entries, own, expected)
            entries = {name: entry for name, entry in entries.items() if entry.path not in adds}
            own = {name: tensor for name, tensor in own.items() if name in entries or name not in expected}
        return cls(folder, hf_config, family, model, entries, own, adds)

    def problems(self) -> list[str]:
        """Tensors that do not fit the model, a phrase each."""
        return mismatches(self.model, self.entries, self.tensors)

    def load(
        self, *, shardings: ShardingFn | None = None, seed: int = 0, note: Callable[[int], Any] = lambda size: None
    ) -> Any:
        """Fills the model and returns it; call it once.

        Raises:
            UserError: tensors are missing, unknown or of another shape; all of them are named at once.
        """
        if problems := self.problems():
            raise UserError(f"{self.folder} does not fit its model: {'; '.join(problems)}{self._remedy(problems)}")
        _initialise(self.model, {entry.path for entry in self.entries.values()}, seed, shardings)
        fill(self.model, self.entries, self.tensors, shardings=shardings, note=note)
        return self.model

    def _remedy(self, problems: list[str]) -> str:
        published = re.compile(r"\.(global_factor|alpha|dwconv\.weight|dconv_ada\.weight) is unknown")
        if "attention" not in self.hf_config and any(published.search(each) for each in problems):
            return "; give the attention of the model"
        return ""


def from_pretrained(
    name_or_path: str | Path,
    *,
    attention: Attentions | None = None,
    dtype: str | None = None,
    param_dtype: str | None = None,
    shardings: ShardingFn | None = None,
    seed: int = 0,
    head: str | None = None,
) -> Any:
    """Loads a model from a Hugging Face folder, a repository on the Hub or a file of llama2.c, with any attention.

    Another attention turns a Transformer into a linearized one. Parameters that it adds are initialised as in the paper
    (You et al., ICML 2024): its factor and its convolution at zero, random features drawn anew. The host holds one
    parameter beside the model.

    Args:
        name_or_path: a folder, `owner/name` on the Hub, or a file in llama2.c's first format.
        attention: replaces that of the folder (softmax, if its `config.json` names none); for a model with several, one
            for all of them, or some of them by name.
        dtype: type of activations; None takes that of the parameters.
        param_dtype: type of parameters; None takes the stored one (float32 for float16).
        shardings: the sharding of a variable by its path and shape; None is the default device.
        seed: of the parameters that the attention or the head adds.
        head: model of the family by its purpose, such as `classifier`; None takes that of the folder.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or of a kind that is not supported; tensors are missing,
            unknown or of another shape.
    """
    opened = Pretrained.open(name_or_path, attention=attention, dtype=dtype, param_dtype=param_dtype, head=head)
    return opened.load(shardings=shardings, seed=seed)


def stored_type(tensors: Mapping[str, Any]) -> str:
    """Parameter type of a checkpoint: that of most of its bytes, or float32 if a model cannot have that."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + tensor.nbytes
    most = max(sizes, key=lambda name: sizes[name], default="float32")
    return most if most in DTYPES else "float32"


def _check_precision(config: Any) -> None:
    if "float64" in (config.dtype, config.param_dtype) and not jax.config.read("jax_enable_x64"):
        raise UserError(
            "dtype or param_dtype is float64, which needs 64-bit JAX; call jax.config.update('jax_enable_x64', True) "
            "first, or give dtype and param_dtype float32"
        )


def abstract(build: Any, config: Any) -> Any:
    """Builds an abstract model: shapes and types without values."""
    return nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))


def _added(entries: Entries, tensors: Mapping[str, Any], expected: set[str]) -> frozenset[tuple[Any, ...]]:
    """Paths of variables that the checkpoint neither has nor should have: another attention or head adds them."""
    there = {entry.path for name, entry in entries.items() if name in tensors or name in expected}
    return frozenset(entry.path for entry in entries.values() if entry.path not in there)


def _initialise(model: nnx.Module, filled: set[tuple[Any, ...]], seed: int, shardings: ShardingFn | None) -> None:
    """Initialises all variables but those that will be filled; the compiler drops the work for the latter."""
    build, config = type(model), model.config
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model)) if path not in filled]
    if not paths:
        return

    def start(key: Any) -> list[Any]:
        variables = dict(nnx.to_flat_state(nnx.state(build(config, rngs=nnx.Rngs(key)))))
        return [variables[path] for path in paths]

    places = None
    if shardings is not None:
        shapes = dict(nnx.to_flat_state(nnx.state(model)))
        places = [shardings(path, shapes[path].shape) for path in paths]
    values = jax.jit(start, out_shardings=places)(jax.random.key(seed))
    nnx.update(model, nnx.from_flat_state(list(zip(paths, values, strict=True))))
