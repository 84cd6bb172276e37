"""`python -m lin_jax.hub`, which is `python -m lin_jax hub`."""

from lin_jax.cli.hub.options import main
from lin_jax.errors import exit_cleanly

if __name__ == "__main__":
    exit_cleanly(main)
