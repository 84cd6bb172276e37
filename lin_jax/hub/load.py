"""Models from Hugging Face folders: `from_pretrained` builds a model, checks it and fills it, tensor by tensor."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from lin_jax.errors import UserError, check_seed
from lin_jax.hub.config_json import Attentions, family_of, model_config
from lin_jax.hub.families.heads import has_own_head, head_remedy, with_shared_head
from lin_jax.hub.families.registry import Family
from lin_jax.hub.files import find_checkpoint, read_checkpoint, read_config, unread_index
from lin_jax.hub.int8.filling import fill_rounded
from lin_jax.hub.int8.matrices import is_feature_map
from lin_jax.hub.int8.tensor import FIELD, RoundedTensor, joined
from lin_jax.hub.llama2c import read_llama2c
from lin_jax.hub.tensors import (
    Entries,
    Mismatch,
    ShardingFn,
    TensorEntry,
    fill,
    mismatches,
    same,
    stored,
    summary,
    transpose,
)
from lin_jax.models import CausalModel, LayerStack
from lin_jax.models.compute import DTYPES, ComputeConfig
from lin_jax.models.stored_weights import Storage, finish_at, module_at, separate_shapes, store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubCheckpoint:
    """`config.json` and headers of the tensors of a checkpoint; no tensor is read yet.

    Attributes:
        folder: its folder; a file, if it is one of llama2.c.
        hf_config: contents of its `config.json`.
        tensors: tensors that are read when they are used, by name.
        notes: lines about files that were left out.
    """

    folder: Path
    hf_config: dict[str, Any]
    tensors: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, name_or_path: str | Path) -> "HubCheckpoint":
        """Opens a folder, `owner/name` on the Hub, or a file in llama2.c's first format, also one to be fetched.

        Raises:
            UserError: there is no such checkpoint, or it is damaged.
        """
        path = Path(name_or_path).expanduser()
        folder = path if path.is_file() else find_checkpoint(name_or_path)
        if folder.is_file():
            return cls(folder, *read_llama2c(folder))
        note = unread_index(folder)
        hf_config, tensors = read_config(folder), read_checkpoint(folder)
        known = joined(tensors) if FIELD in hf_config else tensors
        return cls(folder, hf_config, known, () if note is None else (note,))

    @property
    def rounded(self) -> bool:
        """True if its matrices are int8."""
        return FIELD in self.hf_config


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
        adds: names of tensors that another attention or head than the folder's adds; they are initialised.
        notes: lines about what is read another way than it stands in the folder; `load` logs them.
        left_out: names of tensors in the files that are not read: buffers, copies, heads of other tasks.
    """

    folder: Path
    hf_config: dict[str, Any]
    family: Family
    model: Any
    entries: Entries
    tensors: Mapping[str, Any]
    adds: frozenset[str]
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

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
        own_type = stored_type(tensors, rounded=checkpoint.rounded)
        if param_dtype is None and checkpoint.rounded:
            # What int8 and bfloat16 numbers stand for is exact in float32.
            dtype, param_dtype = dtype or own_type, own_type if own_type == "float64" else "float32"
        param_dtype = param_dtype or own_type
        config = replace(config, param_dtype=param_dtype, dtype=dtype or param_dtype)
        _check_precision(config)
        _check_layers(config, checkpoint)
        chosen = family.head_for(head, hf_config.get("architectures"))
        own_head = chosen if head is None else family.own_head(hf_config.get("architectures"))
        model = abstract(chosen.model, config)
        entries = family.entries(model)
        own: Mapping[str, Any] = with_shared_head(family, hf_config, entries, family.own_tensors(model, tensors))
        notes = [*checkpoint.notes, *family.remarks(hf_config, config)]
        if chosen == own_head and has_own_head(family, config, own):
            model = abstract(chosen.model, replace(config, tie_embeddings=False))
            entries = family.entries(model)
            notes.append(
                f"config.json ties the head to the embedding, but {family.head_name} is another matrix: it is read, as "
                "if tie_word_embeddings were false"
            )
        if head is not None and (name := family.foreign(hf_config.get("architectures"))):
            notes.append(
                f"config.json names a {name[:80]}, and a {chosen.model.__name__} is asked for: what both have by the "
                "same names is read, any other head is left out"
            )
        adds: frozenset[str] = frozenset()
        if attention is not None or chosen != own_head:
            there = family.entries(abstract(own_head.model, model_config(family, hf_config)))
            expected = set(family.own_tensors(model, {name: np.asarray(number) for number, name in enumerate(there)}))
            adds = _added(entries, own, expected)
            entries = {name: entry for name, entry in entries.items() if name not in adds}
            own = {name: tensor for name, tensor in own.items() if name in entries or name not in expected}
        read = {id(tensor) for tensor in own.values()}
        left_out = tuple(name for name, tensor in tensors.items() if id(tensor) not in read)
        return cls(folder, hf_config, family, model, entries, own, adds, tuple(notes), left_out)

    @property
    def rounded(self) -> bool:
        """True if the checkpoint's matrices are int8."""
        return FIELD in self.hf_config

    def problems(self) -> list[Mismatch]:
        """Tensors that do not fit the model."""
        return mismatches(self.model, self.entries, self.tensors)

    def load(
        self,
        *,
        shardings: ShardingFn | None = None,
        seed: int = 0,
        note: Callable[[int], Any] = lambda size: None,
        storage: Callable[[Any], Storage] | None = None,
    ) -> Any:
        """Fills the model and returns it; call it once.

        Args:
            shardings: as in `from_pretrained`.
            seed: as in `from_pretrained`.
            note: called with the bytes of every tensor that was read.
            storage: chooses how the abstract model's matrices are stored, for a model that only decodes: its layers
                are taken apart, and its weights stay as they are in the file where they can. None is a model that can
                learn, as is one that writes no texts or whose layers are no plain stack.

        Raises:
            UserError: tensors are missing, unknown or of another shape; all of them are named at once.
        """
        self.begin(seed, shardings)
        if storage is None or not isinstance(self.model, CausalModel) or type(self.model.layers) is not LayerStack:
            fill(self.model, self.entries, self.tensors, shardings=shardings, note=note)
            return self.model
        chosen = storage(self.model)
        entries = decoding_entries(self.model, self.entries, chosen)

        def filled(path: tuple[Any, ...]) -> None:
            finish_at(self.model, path, chosen)

        if chosen.int8:
            entries = fill_rounded(self.model, entries, self.tensors, note)
        left = {name: tensor for name, tensor in self.tensors.items() if name in entries}
        fill(self.model, entries, left, note=note, filled=filled)
        return self.model

    def begin(self, seed: int = 0, shardings: ShardingFn | None = None) -> None:
        """Initialises what the model adds to the checkpoint, once all tensors are known to fit; logs the notes.

        Args:
            seed: as in `from_pretrained`.
            shardings: as in `from_pretrained`.

        Raises:
            UserError: tensors are missing, unknown or of another shape; all of them are named at once.
        """
        check_seed(seed)
        if problems := self.problems():
            remedy = self.remedy(problems)
            raise UserError(f"{self.folder} does not fit its model: {summary(problems)}{remedy and '; '}{remedy}")
        for line in self.notes:
            log.warning("%s", line)
        _initialise(self.model, _filled(self.model, self.entries), seed, shardings)

    def remedy(self, problems: Sequence[Mismatch]) -> str:
        """Says how to mend tensors that do not fit; empty where that is not known."""
        published = re.compile(r"\.(global_factor|alpha|dwconv\.weight|dconv_ada\.weight)$")
        unknown = [each.name for each in problems if each.kind == "is unknown"]
        if "attention" not in self.hf_config and any(published.search(name) for name in unknown):
            return "give the attention of the model"
        if any(".lora_" in name for name in unknown):
            return "it holds adapters beside the weights; merge them with PEFT: merge_and_unload, then save_pretrained"
        return head_remedy(self.family, self.hf_config, problems)


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
    parameter beside the model. Of int8 weights, the model has the numbers that they stand for, exactly, in float32.

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


def stored_type(tensors: Mapping[str, Any], *, rounded: bool = False) -> str:
    """Parameter type of a checkpoint: that of most of its bytes, or float32 if a model cannot have that.

    Args:
        tensors: its tensors, by name.
        rounded: whether its matrices were rounded; they and feature maps do not count then.
    """
    sizes: dict[str, int] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, RoundedTensor) or (rounded and is_feature_map(name)):
            continue
        sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + tensor.nbytes
    most = max(sizes, key=lambda name: sizes[name], default="float32")
    return most if most in DTYPES else "float32"


def _check_layers(config: Any, checkpoint: HubCheckpoint) -> None:
    """Refuses more layers than there are tensors before a model is built, which takes time for each of them."""
    layers, count = max(config.num_layers, getattr(config, "decoder_layers", 0)), len(checkpoint.tensors)
    if layers > count:
        raise UserError(
            f"config.json says {layers:,} layers, and the files in {checkpoint.folder} hold {count:,} tensors in all; "
            "copy both from one checkpoint"
        )


def _check_precision(config: Any) -> None:
    if "float64" in (config.dtype, config.param_dtype) and not jax.config.read("jax_enable_x64"):
        raise UserError(
            "dtype or param_dtype is float64, which needs 64-bit JAX; call jax.config.update('jax_enable_x64', True) "
            "first, or give dtype and param_dtype float32"
        )


def decoding_entries(model: Any, entries: Entries, storage: Storage) -> Entries:
    """Takes an abstract model apart for decoding, in place; the entries of its variables there.

    Args:
        model: the model, whose layers are a stack.
        entries: its entries.
        storage: how its matrices are stored.
    """
    before = {path: variable.shape for path, variable in stored(model).items()}
    model.layers = separate_shapes(model.layers)
    store(model, storage)
    after = stored(model)
    found = {}
    for name, entry in entries.items():
        path, layer = entry.path, entry.layer
        if layer is not None and len(path) > 2 and path[:2] == ("layers", "layers"):
            path, layer = ("layers", "layers", layer, *path[2:]), None
        read, write = entry.read, entry.write
        if path not in after:
            path = (*path[:-1], "matrix", "weight")
            shape = before[entry.path][-2:]
            if after[path].shape == shape[::-1] and module_at(model, path[:-1]).plan.layout == "oi":
                read, write = (same, same) if entry.read is transpose else _turned(entry)
        found[name] = replace(entry, path=path, layer=layer, read=read, write=write)
    return found


def _turned(entry: TensorEntry) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """The transforms of an entry whose variable is stored the other way round."""
    return lambda array: entry.read(array).T, lambda array: entry.write(array.T)


def abstract(build: Any, config: Any) -> Any:
    """Builds an abstract model: shapes and types without values."""
    return nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))


def _added(entries: Entries, tensors: Mapping[str, Any], expected: set[str]) -> frozenset[str]:
    """Names of tensors that the checkpoint neither has nor should have: another attention or head adds them.

    Where the checkpoint should have those of some of a variable's layers, its attention is another one in the others.
    """
    there = {entry.path for name, entry in entries.items() if name in tensors or name in expected}
    named = {entry.path for name, entry in entries.items() if name in expected}
    return frozenset(
        name
        for name, entry in entries.items()
        if entry.path not in there or (entry.path in named and name not in tensors and name not in expected)
    )


def _filled(model: nnx.Module, entries: Entries) -> set[tuple[Any, ...]]:
    """Paths of variables that are filled whole."""
    variables, counts = stored(model), Counter(entry.path for entry in entries.values())
    return {
        entry.path
        for entry in entries.values()
        if entry.layer is None or counts[entry.path] == variables[entry.path].shape[0]
    }


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
