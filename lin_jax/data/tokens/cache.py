"""Cache of the tokens of documents in memory: a folder that keeps them from run to run.

A corpus has a file of its own, named for the tokenizer and the texts. It is written under another name and renamed
when it is whole; a lock, which the system drops when its holder dies, lets one process write while others wait.
"""

import fcntl
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from lin_jax.data.sources.text import Document
from lin_jax.data.tokenizers.tokenizer import Tokenizer
from lin_jax.data.tokens.file import DamagedError, read_tokens, write_tokens
from lin_jax.data.tokens.pieces import LAYOUT, pieces_of, texts_fingerprint, token_dtype
from lin_jax.data.tokens.progress import TokenizingProgress
from lin_jax.errors import UserError

log = logging.getLogger(__name__)

# Pieces that are tokenized at a time, on all cores.
_TOGETHER = 256


class CachedTokens:
    """Tokens of documents in a file, as a `TokenSource`; the documents themselves may be freed.

    Args:
        fingerprint: digest of the texts.
        tokens: all tokens, `[N]`.
        ends: int64 `[pieces + 1]` where each piece begins and the last one ends.
        check: refuses ids that the model does not know; the file may be another model's, too.
    """

    def __init__(
        self, fingerprint: str, tokens: np.ndarray, ends: np.ndarray, check: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        self.fingerprint = fingerprint
        self._tokens = tokens
        self._ends = ends
        self._check = check

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"tokens": self._check(self._tokens[self._ends[index] : self._ends[index + 1]].astype(np.int32))}

    def __repr__(self) -> str:
        return f"CachedTokens({len(self)})"


def cached_tokens(folder: str, documents: Sequence[Document], tokenizer: Tokenizer) -> CachedTokens:
    """Reads the tokens of documents from a folder; tokenizes them and writes them there if they are missing.

    A damaged file is made again, with a logged warning. Any number of processes may use a folder at once.

    Raises:
        UserError: the folder cannot be written or locked.
    """
    texts = texts_fingerprint(documents)
    path = Path(folder).expanduser() / f"{tokenizer.encoding_fingerprint}-{texts}-{LAYOUT}.tokens"
    try:
        with suppress(FileNotFoundError, DamagedError):
            return CachedTokens(texts, *read_tokens(path), tokenizer.check)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            return CachedTokens(texts, *_read_or_write(path, documents, tokenizer), tokenizer.check)
    except OSError as error:
        raise UserError(
            f"cannot keep tokens in {folder}: {error.strerror}; give another data.cache, or leave it out"
        ) from error


def _read_or_write(path: Path, documents: Sequence[Document], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Reads a file, which another process may have written while this one waited for the lock, or writes it."""
    try:
        return read_tokens(path)
    except FileNotFoundError:
        pass
    except DamagedError as error:
        log.warning("%s is damaged (%s): tokenizing its documents again", path, error)
    unfinished = path.with_suffix(".partial")
    write_tokens(unfinished, _tokens(documents, tokenizer), token_dtype(tokenizer))
    unfinished.replace(path)
    return read_tokens(path)


def _tokens(documents: Sequence[Document], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yields the tokens of all pieces, in order."""
    with TokenizingProgress(len(documents)) as progress:
        pieces = pieces_of(documents)
        for start in range(0, len(pieces), _TOGETHER):
            together = pieces[start : start + _TOGETHER]
            encoded = tokenizer.encode_batch([piece.text(documents) for piece in together])
            yield from (piece.marked(ids, tokenizer) for piece, ids in zip(together, encoded, strict=True))
            progress.advance(sum(piece.last for piece in together))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a file lock, which other processes wait for and which ends with this process at the latest."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that tokenizes the same documents")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
