"""Transformers without its advice to install PyTorch: nothing but its tokenizers is used here."""

import os
from typing import Any

_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


def import_transformers() -> Any:
    """Imports the package, which takes more than a second: to be called where it is used, not at the top of a file."""
    before = os.environ.get(_ADVICE)
    os.environ[_ADVICE] = "1"
    try:
        import transformers
    finally:
        if before is None:
            del os.environ[_ADVICE]
        else:
            os.environ[_ADVICE] = before
    return transformers
