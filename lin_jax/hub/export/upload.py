"""Folders to the Hub: a repository is made if there is none, and the folder's files are put into it."""

import re
from pathlib import Path

from lin_jax.errors import UserError

_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")


def check_upload(name: str) -> None:
    """Finds out before a long conversion that nothing can be uploaded after it.

    Args:
        name: `OWNER/NAME` of the repository, or `NAME` alone, which is one of whoever is logged in.

    Raises:
        UserError: the name is none, nobody is logged in, or the Hub cannot be reached.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"--push-to-hub {name[:100]!r} is no name of a repository; give OWNER/NAME")
    # Imported only now, when the network is wanted.
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UserError("--push-to-hub needs a login; run `hf auth login`, or set HF_TOKEN")
    try:
        HfApi().whoami()
    except Exception as error:  # the network and the Hub raise dozens of kinds
        raise UserError(f"--push-to-hub cannot log in to the Hub: {_reason(error)}; run `hf auth login`") from error


def upload(folder: Path, name: str, *, private: bool = False) -> str:
    """Uploads a folder's files in one commit; its address.

    Args:
        folder: the folder.
        name: as in `check_upload`.
        private: whether a repository that is made anew is for its owner alone.

    Raises:
        UserError: the Hub refuses it, or cannot be reached; the folder is as it was.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        repository = api.create_repo(name, private=private, exist_ok=True).repo_id
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Model written by lin_jax")
    except Exception as error:  # as above
        raise UserError(
            f"{folder} is whole, and cannot be uploaded as {name}: {_reason(error)}; "
            f"try again with `hf upload {name} {folder}`"
        ) from error
    return f"https://huggingface.co/{repository}"


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200].rstrip(". ")
