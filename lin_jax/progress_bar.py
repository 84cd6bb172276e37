"""Progress bars on terminals and in notebooks; none where output goes to a file."""

import importlib.util
import sys
from typing import Any, TextIO

from tqdm import tqdm


def in_notebook() -> bool:
    """True in a process that a notebook's cells run in."""
    # That `ipykernel` was imported says little: whoever starts a notebook imports it, too.
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def is_interactive() -> bool:
    """True where somebody looks at bars as they move: on a terminal, or in a notebook."""
    return in_notebook() or sys.stderr.isatty()


def progress_stream() -> TextIO:
    """Stream of bars and lines of progress: stderr, but stdout in notebooks, which show stderr in red, as errors."""
    return sys.stdout if in_notebook() else sys.stderr


def progress_bar(*, shown: bool = True, **options: Any) -> Any:
    """Makes a tqdm bar, a widget in notebooks that have widgets; it is disabled where nobody would see it.

    Args:
        shown: False shows none anywhere.
        options: of `tqdm`, such as total, desc and unit.
    """
    disable = not (shown and is_interactive())
    if in_notebook() and importlib.util.find_spec("ipywidgets") is not None:
        from tqdm.notebook import tqdm as notebook_bar

        return notebook_bar(disable=disable, **options)
    return tqdm(file=progress_stream(), dynamic_ncols=True, disable=disable, **options)
