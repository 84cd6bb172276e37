"""Continues a prompt with a trained model: `python decode.py MODEL [PROMPT | --prompt-file F] [options]`."""

from lin_jax.cli.decode.options import main
from lin_jax.errors import exit_cleanly

if __name__ == "__main__":
    exit_cleanly(main)
