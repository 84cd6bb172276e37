"""Incremental decoding: tokens to text while they are still being generated."""

import re
from collections.abc import Sequence

import numpy as np

from lin_jax.data.tokenizers.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Ids before a text of which its first piece depends, but for characters that are spelled in more bytes.
_CONTEXT = 8


class StreamDecoder:
    """Decodes tokens as they come: the pieces that it returns, concatenated, are the text of all tokens.

    A token may end inside a UTF-8 character. Such tokens wait for the next ones, so that no piece holds
    half a character.

    Args:
        tokenizer: decodes tokens.
        skip_special_tokens: leave out the text of special tokens, such as the end-of-text token.
        after: ids that come before the text, and of which no text is returned.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False, after: Sequence[int] | np.ndarray = ()
    ):
        self._tokenizer = tokenizer
        self._skipped = frozenset(tokenizer.special_tokens if skip_special_tokens else ())
        # Tokenizers that mark word starts drop a space before the very first word only, so a piece is
        # what its tokens add to the text of the tokens before them.
        self._before = self._end_of(after)
        self._waiting: list[int] = []

    def push(self, ids: Sequence[int] | np.ndarray) -> str:
        """Adds the next ids `[N]` and returns the text that is now complete, perhaps empty."""
        self._waiting += [int(token) for token in ids if int(token) not in self._skipped]
        text = self._added()
        if not self._waiting or text.endswith("\ufffd") or self._ends_in_byte_token():
            return ""
        return self._release(text)

    def settle(self) -> str:
        """Returns the text of the tokens that still wait, as it stands; the text goes on."""
        if not self._waiting:
            return ""
        text, before = self._added(), self._before
        self._release(text)
        if text.endswith("\ufffd"):
            # What was shown as half a character is not made whole by what follows.
            self._before = before
        return text

    def flush(self) -> str:
        """Returns the text of the tokens that still wait, and resets for another text."""
        text = self._added()
        self._before, self._waiting = [], []
        return text

    def _end_of(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        """The last ids before a text, from the beginning of a character on."""
        kept = [int(token) for token in ids if int(token) not in self._skipped]
        count = _CONTEXT
        while count < len(kept) and self._tokenizer.decode(kept[-count:]).startswith("\ufffd"):
            count *= 2
        return kept[-count:]

    def _added(self) -> str:
        before = self._tokenizer.decode(self._before)
        return self._tokenizer.decode(self._before + self._waiting)[len(before) :]

    def _ends_in_byte_token(self) -> bool:
        """True if the last token is a byte (SentencePiece): one more may still change the whole run of them."""
        token = self._tokenizer.backend.id_to_token(self._waiting[-1])
        return token is not None and _BYTE_TOKEN.fullmatch(token) is not None

    def _release(self, text: str) -> str:
        self._before, self._waiting = self._waiting, []
        return text
