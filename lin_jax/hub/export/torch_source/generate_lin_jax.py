"""The function in `custom_generate/generate.py`: texts of the model beside it, with guesses if asked for."""

from typing import Any


def generate(inputs: Any = None, *args: Any, model: Any, **options: Any) -> Any:
    """The model's texts; arguments are those of `generate` in transformers, and some more.

    Args:
        inputs: tokens `[B, T]`; also as `input_ids`.
        args: more arguments by their place.
        model: the model, opened with `trust_remote_code=True`.
        options: more arguments by name. `speculative=True` drafts tokens, which one pass verifies.

    Raises:
        TypeError: the model's code is not that of this folder.
    """
    if not hasattr(model, "generate_with_drafts"):
        raise TypeError(
            f"this folder's generate is for its own model, not a {type(model).__name__}; "
            "open the folder with trust_remote_code=True"
        )
    # What opens a folder puts this function in the place of the model's `generate`; else it was asked for by its name.
    asked = isinstance(options.get("custom_generate"), str) or "generate" not in vars(model)
    if isinstance(options.get("custom_generate"), str):
        del options["custom_generate"]
        options.pop("trust_remote_code", None)
    return model.generate_with_drafts(inputs, *args, **{"speculative": asked, **options})
