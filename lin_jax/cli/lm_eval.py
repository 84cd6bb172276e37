"""Command `lm-eval`: EleutherAI's lm-evaluation-harness, which then knows the models of this package."""

import importlib.util
import sys
from collections.abc import Sequence
from unittest.mock import patch

from lin_jax.errors import UserError

SUBCOMMANDS = ("run", "ls", "validate")
_NAMED = ("--model", "-M", "--config", "-C")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the harness's command line; returns the exit status.

    Args:
        argv: the harness's options, `run` and `--model lin_jax` understood; None takes the process's own.

    Raises:
        UserError: the harness is not installed.
    """
    options = list(sys.argv[1:] if argv is None else argv)
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed; install it with 'pip install lin-jax[eval]'")
    from lm_eval.__main__ import cli_evaluate

    import lin_jax.lm_eval  # noqa: F401 - importing it registers the model

    with patch.object(sys, "argv", ["lm-eval", *with_model(options)]):
        cli_evaluate()
    return 0


def with_model(options: Sequence[str]) -> list[str]:
    """Options with the subcommand and the model that are meant where none is named."""
    if options and options[0] not in SUBCOMMANDS and options[0] not in ("--help", "-h"):
        options = ["run", *options]
    named = any(option.partition("=")[0] in _NAMED or option in ("--help", "-h") for option in options)
    return [*options] if named or options[:1] != ["run"] else ["run", "--model", "lin_jax", *options[1:]]
