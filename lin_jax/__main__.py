"""`python -m lin_jax COMMAND ...`: lists the commands, and runs one."""

from lin_jax.cli.main import main
from lin_jax.errors import exit_cleanly

if __name__ == "__main__":
    exit_cleanly(main)
