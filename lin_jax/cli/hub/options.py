"""Command `hub`: `python -m lin_jax hub import|export|inspect ...`."""

import argparse
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import docstring_parser  # of jsonargparse[signatures]

from lin_jax.attention import AttentionConfig
from lin_jax.errors import OptionParser, UserError
from lin_jax.models.compute import DTYPES
from lin_jax.training.checkpoint.selector import parse_selector

# As in `lin_jax.hub.conversion.convert`, which help need not wait for.
WEIGHTS = ("stored", "int8", "float")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the options of a command line.

    Raises:
        UserError: an option is unknown or has a wrong value.
        SystemExit: help was asked for.
    """
    parser = OptionParser(
        prog="python -m lin_jax hub", description="Hugging Face folders in and out.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="import|export|inspect")
    about = "Makes a folder of a checkpoint: of a Hugging Face folder, OWNER/NAME on the Hub, or a file of llama2.c."
    importing = commands.add_parser("import", help=about, description=about, allow_abbrev=False)
    importing.add_argument("source", metavar="SOURCE", help="folder, OWNER/NAME, or file of llama2.c (.bin)")
    _add_attention(importing)
    importing.add_argument(
        "--tokenizer", metavar="PLACE", help="folder of the tokenizer, or .bin, .model or .vocab file"
    )
    importing.add_argument("--adapter", metavar="FOLDER", help="PEFT folder of LoRA adapters to merge into the model")
    importing.add_argument("--head", help="what the model is for, such as causal_lm (default: as SOURCE says)")
    importing.add_argument("--seed", type=int, default=0, help="of what the attention adds")
    about = "Makes a folder of what train.py wrote: the model, its tokenizer, and its Medusa heads if there are any."
    exporting = commands.add_parser("export", help=about, description=about, allow_abbrev=False)
    exporting.add_argument("source", metavar="RUN", help="run folder of a model or of heads, or a Hugging Face folder")
    exporting.add_argument(
        "--step", type=parse_selector, metavar="N|best", help="checkpoint: its step, or best (default: the newest)"
    )
    exporting.add_argument(
        "--adapters", action="store_true", help="write the run's LoRA adapters alone, as a PEFT folder"
    )
    for each in (importing, exporting):
        each.add_argument("out", metavar="OUT", help="folder to write")
        each.add_argument("--dtype", choices=DTYPES, help="type of the parameters (default: as they are)")
        each.add_argument(
            "--weights",
            choices=WEIGHTS,
            default="stored",
            help="stored (default) writes matrices as they are; int8 rounds those of linear layers, head and table of "
            "tokens; float turns int8 ones back",
        )
        each.add_argument("--figures", metavar="FILE", help="JSON object of measured figures for the model card")
        each.add_argument("--max-shard-bytes", type=int, default=5_000_000_000, metavar="N", help="largest file")
        each.add_argument("--overwrite", action="store_true", help="replace what OUT holds")
        each.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload OUT to this repository, too")
        each.add_argument("--private", action="store_true", help="make that repository for its owner alone")
    about = "Shows what a checkpoint is, and which of its tensors do not fit; status 1 if any."
    inspecting = commands.add_parser("inspect", help=about, description=about, allow_abbrev=False)
    inspecting.add_argument("source", metavar="FOLDER", help="folder, OWNER/NAME, or file of llama2.c (.bin)")
    _add_attention(inspecting)
    options = parser.parse_args(argv)
    if (size := getattr(options, "max_shard_bytes", 1)) < 1:
        raise UserError(f"--max-shard-bytes is {size}; give at least 1")
    return options


def _add_attention(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("attention", "another attention than the checkpoint's own")
    group.add_argument(
        "--attention",
        metavar="NAME",
        help="such as augmented, or performer+local+convolution; several, between commas, are those of the layers in "
        "turn, such as augmented,augmented,softmax",
    )
    group.add_argument("--attention.layers", metavar="N=NAME,...", help="of some layers, such as 3=softmax,7=softmax")
    hints = typing.get_type_hints(AttentionConfig)
    described = docstring_parser.parse(AttentionConfig.__doc__ or "").params
    about = {each.arg_name: " ".join((each.description or "").split()).rstrip(".") for each in described}
    for each in fields(AttentionConfig):
        if each.name not in ("name", "pattern", "layers"):
            kind = next(part for part in (typing.get_args(hints[each.name]) or (hints[each.name],)))
            group.add_argument(
                f"--attention.{each.name}",
                type=_boolean if kind is bool else kind,
                metavar=kind.__name__.upper(),
                help=f"{about[each.name]} (default: {each.default})",
            )


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return text.lower() == "true"


def attention_of(options: argparse.Namespace) -> AttentionConfig | None:
    """Reads the attention that the options ask for; None is the checkpoint's own."""
    prefix = "attention."
    given = {name.removeprefix(prefix): value for name, value in vars(options).items() if name.startswith(prefix)}
    given = {name: value for name, value in given.items() if value is not None}
    if options.attention is None:
        if given:
            raise UserError(f"--attention.{next(iter(given))} needs --attention NAME, the attention that it is for")
        return None
    if "layers" in given:
        pairs = [pair.partition("=") for pair in given["layers"].split(",")]
        given["layers"] = [(number.strip(), name.strip()) for number, _, name in pairs]
    if "," in options.attention:
        return AttentionConfig(pattern=[name.strip() for name in options.attention.split(",")], **given)
    return AttentionConfig(name=options.attention, **given)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    Args:
        argv: the command line; None takes the process's own.
    """
    options = parse(sys.argv[1:] if argv is None else argv)
    # Imported only now: help and wrong options should not wait for them.
    import jax

    from lin_jax.cli.hub import commands
    from lin_jax.devices import device_kind
    from lin_jax.hub.export.upload import check_upload, upload

    device_kind()
    run: dict[str, Callable[..., Any]] = {
        "import": commands.import_checkpoint,
        "export": commands.export_run,
        "inspect": commands.inspect_checkpoint,
    }
    arguments = {name: value for name, value in vars(options).items() if not name.startswith(("attention", "command"))}
    if options.command != "export":
        arguments["attention"] = attention_of(options)
    name, private = arguments.pop("push_to_hub", None), arguments.pop("private", False)
    if private and name is None:
        raise UserError("--private is for a repository; name it with --push-to-hub OWNER/NAME")
    if name is not None:
        check_upload(name)
    with jax.enable_x64(arguments.get("dtype") == "float64" or jax.config.read("jax_enable_x64")):
        status = run[options.command](**arguments) or 0
    if name is not None and not status:
        print(f"{upload(Path(options.out), name, private=private)} holds {options.out}")
    return status
