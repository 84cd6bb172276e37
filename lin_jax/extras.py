"""Packages that only some of the work needs: imported when they are used, or asked for in one line."""

import importlib
from typing import Any

from lin_jax.errors import UserError

# The extra of pyproject.toml that installs each.
EXTRAS = {
    "datasets": "train",
    "grain": "train",
    "lm_eval": "eval",
    "pyarrow": "train",
    "tensorboardX": "train",
    "jinja2": "demo",
    "matplotlib": "plot",
}


def require(name: str, purpose: str) -> Any:
    """Imports a module of a package that is installed by an extra.

    Args:
        name: of the module, such as "matplotlib.figure".
        purpose: of it, the message's subject: "training".

    Returns:
        The module.

    Raises:
        UserError: its package is not installed; the message says what installs it.
    """
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise  # A package that is there lacks one of its own.
        raise UserError(
            f"{purpose} needs the package {package}, which is not installed; "
            f"install it with: pip install 'lin-jax[{EXTRAS[package]}]'"
        ) from error
