"""Goes on from a prompt with a trained model: `python decode.py MODEL [PROMPT | --prompt-file F] [options]`."""

import sys

from lin_jax.decoding.command import decode, parse
from lin_jax.errors import exit_cleanly


def main() -> int:
    """Runs the command line; returns the exit status."""
    return decode(parse(sys.argv[1:]))


if __name__ == "__main__":
    exit_cleanly(main)
