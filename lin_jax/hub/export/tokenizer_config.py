"""The tokenizer_config.json of exported folders, in words that transformers 4 knows as well as 5 does."""

import json
from pathlib import Path

# What transformers 5 calls the class that is nothing but a tokenizer.json; it knows the older name, too.
_NEW_NAME, _KNOWN_NAME = "TokenizersBackend", "PreTrainedTokenizerFast"
# Notes of transformers 5 on how the tokenizer was opened here; they are no part of it.
_NOTES = ("is_local", "local_files_only")


def widen_tokenizer_config(folder: Path) -> None:
    """Rewrites what transformers 5 has written into a folder so that 4.57 opens it; all else stays as it is."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    written = json.loads(file.read_text(encoding="utf-8-sig"))
    if not isinstance(written, dict):
        return
    widened = {name: value for name, value in written.items() if name not in _NOTES}
    if widened.get("tokenizer_class") == _NEW_NAME:
        widened["tokenizer_class"] = _KNOWN_NAME
    if isinstance(widened.get("extra_special_tokens"), list):  # In transformers 4 that name is for an object.
        widened.setdefault("additional_special_tokens", widened.pop("extra_special_tokens"))
    if widened != written:
        file.write_text(json.dumps(widened, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
