"""Goes on from a prompt with a trained model: `python decode.py MODEL [PROMPT | --prompt-file F] [options]`."""

import sys

from lin_jax.errors import exit_cleanly


def main() -> int:
    """Runs the command line; returns the exit status."""
    from lin_jax.decoding.options import parse

    options = parse(sys.argv[1:])
    # Help and wrong options need not wait for JAX.
    from lin_jax.decoding.command import decode

    return decode(options)


if __name__ == "__main__":
    exit_cleanly(main)
