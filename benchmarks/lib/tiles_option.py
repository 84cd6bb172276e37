"""The option `--tiles` of benchmarks: another table of tiles than the package's own, which `tune` has written."""

import argparse
from pathlib import Path

from lin_jax.errors import UserError
from pallas_kernels.tiles import use_table


def add_tiles_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option to a command line."""
    parser.add_argument("--tiles", type=Path, metavar="FILE", help="table of tiles instead of the package's own")


def use_tiles(options: argparse.Namespace) -> None:
    """Makes kernels that are traced from here on use the table that was asked for."""
    if options.tiles is None:
        return
    if not options.tiles.is_file():
        raise UserError(
            f"--tiles {options.tiles} is no file; give one that `python -m pallas_kernels.tune` has written"
        )
    use_table(options.tiles)
