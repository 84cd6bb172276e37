"""Models from Hugging Face folders: `from_pretrained` builds a model, checks it and fills it, tensor by tensor."""

import logging
import re
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
from lin_jax.hub.llama2c import read_llama2c
from lin_jax.hub.tensors import Entries, Mismatch, ShardingFn, fill, mismatches, summary
from lin_jax.models.compute import DTYPES, ComputeConfig

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
        """Opens a folder, `owner/name` on the Hub, or a file in llama2.c's first format.

        Raises:
            UserError: there is no such checkpoint, or it is damaged.
        """
        path = Path(name_or_path).expanduser()
        if path.is_file():
            return cls(path, *read_llama2c(path))
        folder = find_checkpoint(name_or_path)
        note = unread_index(folder)
        return cls(folder, read_config(folder), read_checkpoint(folder), () if note is None else (note,))


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
        notes: lines about what is read another way than it stands in the folder; `load` logs them.
    """

    folder: Path
    hf_config: dict[str, Any]
    family: Family
    model: Any
    entries: Entries
    tensors: Mapping[str, Any]
    adds: frozenset[tuple[Any, ...]]
    notes: tuple[str, ...] = ()

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
        adds: frozenset[tuple[Any, ...]] = frozenset()
        if attention is not None or chosen != own_head:
            there = family.entries(abstract(own_head.model, model_config(family, hf_config)))
            expected = set(family.own_tensors(model, {name: np.asarray(number) for number, name in enumerate(there)}))
            adds = _added(entries, own, expected)
            entries = {name: entry for name, entry in entries.items() if entry.path not in adds}
            own = {name: tensor for name, tensor in own.items() if name in entries or name not in expected}
        return cls(folder, hf_config, family, model, entries, own, adds, tuple(notes))

    def problems(self) -> list[Mismatch]:
        """Tensors that do not fit the model."""
        return mismatches(self.model, self.entries, self.tensors)

    def load(
        self, *, shardings: ShardingFn | None = None, seed: int = 0, note: Callable[[int], Any] = lambda size: None
    ) -> Any:
        """Fills the model and returns it; call it once.

        Raises:
            UserError: tensors are missing, unknown or of another shape; all of them are named at once.
        """
        check_seed(seed)
        if problems := self.problems():
            remedy = self.remedy(problems)
            raise UserError(f"{self.folder} does not fit its model: {summary(problems)}{remedy and '; '}{remedy}")
        for line in self.notes:
            log.warning("%s", line)
        _initialise(self.model, {entry.path for entry in self.entries.values()}, seed, shardings)
        fill(self.model, self.entries, self.tensors, shardings=shardings, note=note)
        return self.model

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
