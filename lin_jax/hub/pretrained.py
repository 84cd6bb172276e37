"""Models from Hugging Face folders: `from_pretrained` builds, checks and fills one, tensor by tensor."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from lin_jax.errors import UserError
from lin_jax.hub.description import Attentions, configuration, family_of
from lin_jax.hub.families import Family
from lin_jax.hub.files import read_checkpoint, read_config, resolve
from lin_jax.hub.llama2c import read_llama2c
from lin_jax.hub.tensors import Entries, Place, fill, misfits
from lin_jax.models.parts import DTYPES


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint that is opened and not yet read.

    Attributes:
        folder: where it is; a file, where it is one of llama2.c.
        description: contents of its `config.json`.
        family: its model family.
        model: the model, of shapes.
        entries: the model's tensors that are to be read, by name.
        tensors: what the checkpoint holds for this model, by name.
        adds: what another attention or head than the folder's adds, by path; it is initialised.
    """

    folder: Path
    description: dict[str, Any]
    family: Family
    model: Any
    entries: Entries
    tensors: Mapping[str, Any]
    adds: frozenset[tuple[Any, ...]]

    @classmethod
    def open(
        cls,
        place: str | Path,
        *,
        attention: Attentions | None = None,
        dtype: str | None = None,
        param_dtype: str | None = None,
        head: str | None = None,
    ) -> "Pretrained":
        """Opens a folder; the arguments are those of `from_pretrained`."""
        folder, description, tensors = _read(place)
        family = family_of(description)
        config = configuration(family, description, attention)
        param_dtype = param_dtype or stored_type(tensors)
        config = replace(config, param_dtype=param_dtype, dtype=dtype or param_dtype)
        _check_precision(config)
        own_head = family.head_for(None, description.get("architectures"))
        chosen = own_head if head is None else family.head_for(head, None)
        model = abstract(chosen.model, config)
        entries = family.entries(model)
        own: Mapping[str, Any] = family.own_tensors(model, tensors)
        adds: frozenset[tuple[Any, ...]] = frozenset()
        if attention is not None or chosen != own_head:
            there = family.entries(abstract(own_head.model, configuration(family, description)))
            expected = set(family.own_tensors(model, {name: np.asarray(number) for number, name in enumerate(there)}))
            adds = _added(entries, own, expected)
            entries = {name: entry for name, entry in entries.items() if entry.path not in adds}
            own = {name: tensor for name, tensor in own.items() if name in entries or name not in expected}
        return cls(folder, description, family, model, entries, own, adds)

    def problems(self) -> list[str]:
        """What of the checkpoint does not fit the model, a phrase each."""
        return misfits(self.model, self.entries, self.tensors)

    def load(
        self, *, shardings: Place | None = None, seed: int = 0, note: Callable[[int], Any] = lambda size: None
    ) -> Any:
        """The model, filled; call it once.

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
        if "attention" not in self.description and any(published.search(each) for each in problems):
            return "; say which attention the model has"
        return ""


def from_pretrained(
    place: str | Path,
    *,
    attention: Attentions | None = None,
    dtype: str | None = None,
    param_dtype: str | None = None,
    shardings: Place | None = None,
    seed: int = 0,
    head: str | None = None,
) -> Any:
    """A model from a Hugging Face folder, a repository on the Hub or a file of llama2.c, with any attention.

    Another attention turns a Transformer into a linearized one. What it adds begins as in the paper (You et al., ICML
    2024): its factor and its convolution at zero, random features drawn anew. The host holds one parameter beside the
    model.

    Args:
        place: a folder, `owner/name` on the Hub, or a file in llama2.c's first format.
        attention: instead of what the folder says (softmax, where it says nothing); for a model with several, one for
            all of them, or some of them by name.
        dtype: type of activations; None takes that of the parameters.
        param_dtype: type of parameters; None takes what is stored (float32 for float16).
        shardings: the sharding of a variable by its path and shape; None is the default device.
        seed: of what the attention or the head adds.
        head: what the model is for, by its name in the family, such as `classifier`; None takes what the folder says.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or of a kind that is not supported; tensors are missing,
            unknown or of another shape.
    """
    opened = Pretrained.open(place, attention=attention, dtype=dtype, param_dtype=param_dtype, head=head)
    return opened.load(shardings=shardings, seed=seed)


def _read(place: str | Path) -> tuple[Path, dict[str, Any], Mapping[str, Any]]:
    path = Path(place).expanduser()
    if path.is_file():
        return path, *read_llama2c(path)
    folder = resolve(place)
    return folder, read_config(folder), read_checkpoint(folder)


def stored_type(tensors: Mapping[str, Any]) -> str:
    """The type for parameters: that of most of the checkpoint's bytes; float32 for what a model cannot have."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + tensor.nbytes
    most = max(sizes, key=lambda name: sizes[name], default="float32")
    return most if most in DTYPES else "float32"


def _check_precision(config: Any) -> None:
    if "float64" in (config.dtype, config.param_dtype) and not jax.config.read("jax_enable_x64"):
        raise UserError(
            "the checkpoint is to be float64, which needs 64-bit JAX; call jax.config.update('jax_enable_x64', True) "
            "first, or take dtype and param_dtype float32"
        )


def abstract(build: Any, config: Any) -> Any:
    """A model of shapes."""
    return nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))


def _added(entries: Entries, tensors: Mapping[str, Any], expected: set[str]) -> frozenset[tuple[Any, ...]]:
    """Variables that the checkpoint has nothing of, nor should have: what another attention or another head adds."""
    there = {entry.path for name, entry in entries.items() if name in tensors or name in expected}
    return frozenset(entry.path for entry in entries.values() if entry.path not in there)


def _initialise(model: nnx.Module, filled: set[tuple[Any, ...]], seed: int, shardings: Place | None) -> None:
    """Gives values to all variables but those that will be filled; the compiler drops the work for the others."""
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
