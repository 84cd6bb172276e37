"""The commands of `python -m lin_jax`, and of the script `lin-jax`."""

import importlib
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NamedTuple

import lin_jax
from lin_jax.errors import UserError, exit_cleanly
from lin_jax.extras import require


class Subcommand(NamedTuple):
    """A command: the module whose `main(argv)` runs it, imported only then, and a line about it."""

    module: str
    about: str


COMMANDS = {
    "train": Subcommand("lin_jax.cli.train", "train a model, draft heads or several stages, as a YAML file describes"),
    "decode": Subcommand("lin_jax.cli.decode.options", "continue prompts, plainly or with lossless speculation"),
    "evaluate": Subcommand(
        "lin_jax.cli.evaluate.options", "measure a model: perplexity, right answers, speed and memory"
    ),
    "lm-eval": Subcommand("lin_jax.cli.lm_eval", "run tasks of the lm-evaluation-harness on a model"),
    "select-layers": Subcommand("lin_jax.cli.select_layers", "choose the layers that keep softmax, for a recipe"),
    "report": Subcommand("lin_jax.cli.report", "compare students with their teacher, by figures that cannot flatter"),
    "hub": Subcommand("lin_jax.cli.hub.options", "import, export and inspect Hugging Face folders"),
    "plot": Subcommand("lin_jax.cli.plot", "draw the curves of one or several runs"),
    "self-generate": Subcommand("lin_jax.cli.self_generate", "write a model's own texts, to train its draft heads on"),
    "glue-predictions": Subcommand("lin_jax.cli.glue_predictions", "write a run's predictions for GLUE's server"),
    "demo": Subcommand("lin_jax.cli.demo", "linearize a softmax model, decode it with drafts, and report"),
}

# Packages of extras without which a command cannot begin.
_NEEDS = {"demo": ("jinja2", "matplotlib")}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status.

    Args:
        argv: `COMMAND [options]`; None takes the process's own.

    Raises:
        UserError: there is no such command, it needs a package that is not installed, or it raises one itself.
    """
    name, *options = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("--help", "-h"):
        print(_help())
        return 0
    if name == "--version":
        print(f"lin_jax {lin_jax.__version__}, jax {version('jax')}, Python {platform.python_version()}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"command '{name}' is unknown; choose one of {', '.join(COMMANDS)}")
    for package in _NEEDS.get(name, ()):
        require(package, f"the command {name}")
    status: int = importlib.import_module(COMMANDS[name].module).main(options)
    return status


def run() -> None:
    """Runs the script `lin-jax`, and exits."""
    exit_cleanly(main)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.about}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m lin_jax COMMAND [options]",
            "",
            "Turns Transformers into linearized language models, trains them, and decodes them speculatively.",
            "",
            *lines,
            "",
            "'python -m lin_jax COMMAND --help' lists a command's options, '--version' says which versions these are.",
        ]
    )
