"""Command `select-layers`: the layers of a linearized model whose softmax is worth keeping, written into a recipe."""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from lin_jax.attention import AttentionConfig
from lin_jax.cli.json_line import json_line
from lin_jax.cli.measured_text import read_measured_text
from lin_jax.errors import OptionParser, UserError
from lin_jax.files import write_durably
from lin_jax.json_files import read_json
from lin_jax.losses.cross_entropy import Batch
from lin_jax.progress_bar import progress_bar
from lin_jax.training.checkpoint.selector import parse_selector

RECORD = ".layers.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    Args:
        argv: the command line; None takes the process's own.
    """
    options = _parse(sys.argv[1:] if argv is None else argv)
    # Help and wrong options need not wait for the checkpoint library.
    from lin_jax.devices import device_kind
    from lin_jax.training.model_source import ModelSource

    recipe = _read_recipe(options.recipe)
    device_kind()
    source = ModelSource.open(options.model, options.step)
    source.check_holds_no_tokenizer(options.tokenizer)
    tokenizer = source.tokenizer(options.tokenizer)
    for name in ("keep", "one_in"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; give at least 1")
    batches, _ = read_measured_text(options, tokenizer, source.run.data if source.is_run else None)
    student, teacher = source.model(), ModelSource.open(options.teacher).model()
    _check_pair(student, teacher, options, batches)
    own, theirs = (each.config.attention.of_layers(each.config.num_layers) for each in (student, teacher))
    kept = [number for number, pair in enumerate(zip(own, theirs, strict=True)) if _entry(*pair) == pair[1].name]
    count = options.keep if options.keep is not None else max(1, len(own) // options.one_in)
    _check_count(count, len(kept), len(own), options.model)
    left = [number for number in range(len(own)) if number not in kept]
    found = _measured(student, teacher, batches, left, Path(f"{options.output}{RECORD}"))
    chosen = sorted([*kept, *found.ranking[: count - len(kept)]])
    _write(Path(options.output), with_layers(recipe, {number: theirs[number] for number in chosen}))
    print(
        json_line(
            {
                "layers": chosen,
                "divergence": found.untouched,
                "restored": {str(layer): found.means[layer] for layer in found.ranking},
                "tokens": found.tokens,
                "recipe": str(options.output),
            }
        )
    )
    return 0


def _measured(student: Any, teacher: Any, batches: Sequence[Batch], layers: list[int], record: Path) -> Any:
    """Divergences with each of some layers restored, kept in a file from batch to batch."""
    from lin_jax.evaluation.layer_selection import LayerDivergences, measure_layers
    from lin_jax.models.params import params_fingerprint, params_of

    digest = hashlib.blake2b(digest_size=8)
    for batch in batches:
        digest.update(batch["tokens"].tobytes())
    identity = [*(params_fingerprint(params_of(each)) for each in (student, teacher)), digest.hexdigest()]
    found = _known(record, identity) or LayerDivergences.of(layers)
    passes = (len(batches) - found.batches) * len(found.layers)
    with progress_bar(total=passes, desc="layers", unit="pass") as bar:
        for known in measure_layers(student, teacher, batches, found, bar.update):
            _write(record, json.dumps({"identity": identity, **asdict(known)}) + "\n")
    return found


def with_layers(recipe: str, layers: dict[int, AttentionConfig]) -> str:
    """The text of a recipe in which some layers have an attention of their own; all else stays as it is written.

    Args:
        recipe: YAML of a run or of stages, whose `model.attention` is one for all layers.
        layers: attentions by the number of the layer.

    Raises:
        UserError: the recipe's attention is a list.
    """
    given = yaml.safe_load(recipe) or {}
    model = given.get("model") or {}
    attention = model.get("attention", {})
    if isinstance(attention, str):
        attention = {"name": attention}
    if not isinstance(attention, dict):
        raise UserError("model.attention of the recipe is a list; give one attention, which the other layers have")
    fields = {name: value for name, value in attention.items() if name not in ("pattern", "layers")}
    base = AttentionConfig.of(fields)
    fields["layers"] = {number: _entry(each, base) for number, each in layers.items()}
    value = yaml.safe_dump(fields, default_flow_style=True, sort_keys=False, width=10**9).strip()
    text = _replaced(recipe, value)
    wanted = {**given, "model": {**model, "attention": fields}}
    try:
        same = yaml.safe_load(text) == wanted
    except yaml.YAMLError:
        same = False
    # There are odd ways to write it, such as a reference to another place.
    return text if same else yaml.safe_dump(wanted, sort_keys=False)


def _replaced(recipe: str, value: str) -> str:
    """The recipe with a value in the place of `model.attention`, which may not be there yet."""
    root = yaml.compose(recipe, Loader=yaml.SafeLoader)
    model = _child(root, "model")
    if not isinstance(model, yaml.MappingNode):
        return f"{recipe.rstrip()}\nmodel:\n  attention: {value}\n" if model is None else recipe
    attention = _child(model, "attention")
    if attention is None:
        at = model.start_mark.index
        if model.flow_style:
            return f"{recipe[: at + 1]}attention: {value}{', ' if model.value else ''}{recipe[at + 1 :]}"
        return f"{recipe[:at]}attention: {value}\n{' ' * model.start_mark.column}{recipe[at:]}"
    return recipe[: attention.start_mark.index] + value + recipe[_end(attention) :]


def _child(node: Any, name: str) -> Any:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for key, value in pairs if key.value == name), None)


def _end(node: Any) -> int:
    """The end of a value; a block's own mark stands behind the empty lines and comments that follow it."""
    if isinstance(node, yaml.ScalarNode) or node.flow_style or not node.value:
        return int(node.end_mark.index)
    last = node.value[-1]
    return _end(last[1] if isinstance(last, tuple) else last)


def _entry(attention: AttentionConfig, base: AttentionConfig) -> str | dict[str, Any]:
    """A layer's attention as a recipe has it: its name, and the fields that are not those of the other layers."""
    names = ("window", "sinks") if attention.name == "softmax" else tuple(asdict(attention))
    left = ("name", "implementation", "pattern", "layers")
    other = {
        name: getattr(attention, name)
        for name in names
        if name not in left and getattr(attention, name) != getattr(base, name)
    }
    return {"name": attention.name, **other} if other else attention.name


def _read_recipe(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UserError(f"cannot read the recipe {path}: {reason}; give a YAML file that train.py takes") from error
    if not isinstance(content, dict):
        raise UserError(f"the recipe {path} holds no names with values; give a YAML file that train.py takes")
    return text


def _check_pair(student: Any, teacher: Any, options: argparse.Namespace, batches: Sequence[Batch]) -> None:
    """Refuses models that do not go together, layer by layer, and text that they have no tokens for."""
    from lin_jax.models import Gpt2, Llama

    for place, model in ((options.model, student), (options.teacher, teacher)):
        if not isinstance(model, Llama | Gpt2):
            raise UserError(f"{place} holds a {type(model).__name__}; give a LLaMA or GPT-2")
    for name in ("num_layers", "hidden_size", "vocab_size"):
        own, their = getattr(student.config, name), getattr(teacher.config, name)
        if own != their:
            raise UserError(
                f"{name} is {own} in {options.model} and {their} in {options.teacher}; give the model's own teacher"
            )
    # Beyond the embedding, JAX would read its last row.
    largest = max((int(batch["tokens"].max()) for batch in batches), default=-1)
    if not 0 <= largest < student.config.vocab_size:
        found = "no tokens" if largest < 0 else f"a token of id {largest}"
        raise UserError(f"the text has {found}, and the model knows {student.config.vocab_size}; give other text")


def _check_count(count: int, kept: int, layers: int, place: str) -> None:
    """Refuses a number of layers that leaves none to choose among."""
    if kept == layers:
        raise UserError(f"all {layers} layers of {place} have the teacher's attention; give a linearized model")
    if not kept < count <= layers:
        raise UserError(
            f"{count} of {layers} layers are to keep the teacher's attention, and {kept} have it; "
            f"give --keep {kept + 1}" + (f" to {layers}" if kept + 1 < layers else "")
        )


def _known(record: Path, identity: list[str]) -> Any:
    """Earlier measurements of the same models and text; None if there are none.

    Raises:
        UserError: it was of other models or another text, or the file is damaged.
    """
    from lin_jax.evaluation.layer_selection import LayerDivergences

    if not record.exists():
        return None
    content = read_json(record)
    if content.pop("identity", None) != identity:
        raise UserError(f"{record} is of other models or another text; remove it, or give another --output")
    try:
        return LayerDivergences(**content)
    except TypeError as error:
        raise UserError(f"{record} is damaged ({error}); remove it") from error


def _write(path: Path, text: str) -> None:
    try:
        write_durably(path, text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another --output") from error


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="python -m lin_jax select-layers",
        description="Restores a teacher's attention in one layer of its linearized student at a time, ranks the layers "
        "by the divergence that is left on held-out text, and writes the best into a recipe. Called again, it goes on.",
    )
    parser.add_argument("model", metavar="MODEL", help="linearized model: run folder or Hugging Face folder")
    parser.add_argument("--teacher", required=True, metavar="PLACE", help="the model that it was made from")
    parser.add_argument("--recipe", required=True, metavar="FILE", help="YAML file whose model.attention is changed")
    parser.add_argument("--output", required=True, metavar="FILE", help="the changed recipe")
    count = parser.add_mutually_exclusive_group(required=True)
    count.add_argument("--keep", type=int, metavar="K", help="layers that keep the teacher's attention")
    count.add_argument("--one-in", type=int, metavar="N", help="one layer in N keeps it")
    parser.add_argument("--text", metavar="PLACE", help="file or folder of text (default: the run's held-out text)")
    parser.add_argument("--step", type=parse_selector, metavar="N|best", help="checkpoint of the run")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer of a file of llama2.c")
    parser.add_argument("--sequence-length", type=int, metavar="N", help="tokens of a row (default: the run's, or 512)")
    parser.add_argument("--batches", type=int, default=8, metavar="N", help="batches read at the most (default: 8)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="sequences in a batch (default: 8)")
    return parser.parse_args(argv)
