"""Command `lm-eval`: EleutherAI's lm-evaluation-harness, which then knows the models of this package."""

import sys
from collections.abc import Sequence
from unittest.mock import patch

from lin_jax.extras import require

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
    harness = require("lm_eval.__main__", "lm-eval")
    import lin_jax.lm_eval  # noqa: F401 - importing it registers the model

    with patch.object(sys, "argv", ["lm-eval", *with_model(options)]):
        harness.cli_evaluate()
    return 0


def with_model(options: Sequence[str]) -> list[str]:
    """Options with the subcommand and the model that are meant where none is named."""
    if options and options[0] not in SUBCOMMANDS and options[0] not in ("--help", "-h"):
        options = ["run", *options]
    named = any(option.partition("=")[0] in _NAMED or option in ("--help", "-h") for option in options)
    return [*options] if named or options[:1] != ["run"] else ["run", "--model", "lin_jax", *options[1:]]
