"""A text as it comes, up to a stop string that must not be shown."""

from collections.abc import Sequence

from lin_jax.data import StreamDecoder, Tokenizer
from lin_jax.decoding.engine.stop_strings import check_stops, first_stop_in


class StreamedText:
    """Turns tokens into text, piece by piece, and ends it where a stop string begins.

    Text that may yet turn out to be the beginning of a stop string waits for what follows. A special token, which shows
    no text, counts by its name where a stop string has that in it: `<|im_end|>` alone, or with text around it.

    Args:
        tokenizer: gives the text of tokens.
        stops: stop strings.
        after: tokens that come before the text, such as the prompt's; a space that parts them from it is kept.

    Raises:
        UserError: a stop string is empty, or not valid Unicode.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), after: Sequence[int] = ()) -> None:
        check_stops(stops)
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens=True, after=after)
        self._names = tokenizer.special_tokens_in(stops)
        self._stops = tuple(stops)
        self._held = max((len(stop) for stop in stops), default=1) - 1
        # What waits, with names of special tokens; True for the characters of these, which are not shown.
        self._waiting = ""
        self._unseen: list[bool] = []
        self._ended = False

    def push(self, tokens: Sequence[int]) -> str:
        """Takes the next tokens, and returns the text that is certain to be shown."""
        begin = 0
        for index, token in enumerate(tokens):
            if token in self._names:
                self._take(self._decoder.push(tokens[begin:index]) + self._decoder.settle())
                self._take(self._names[token], unseen=True)
                begin = index + 1
        self._take(self._decoder.push(tokens[begin:]))
        return self._release(self._held)

    def flush(self) -> str:
        """The rest of the text."""
        self._take(self._decoder.flush())
        return self._release(0)

    def _take(self, text: str, *, unseen: bool = False) -> None:
        self._waiting += text
        self._unseen += [unseen] * len(text)

    def _release(self, held: int) -> str:
        if self._ended:
            return ""
        stop = first_stop_in(self._waiting, self._stops)
        self._ended = stop is not None
        ready = max(len(self._waiting) - held, 0) if stop is None else stop
        pairs = zip(self._waiting[:ready], self._unseen[:ready], strict=True)
        shown = "".join(character for character, unseen in pairs if not unseen)
        self._waiting, self._unseen = self._waiting[ready:], self._unseen[ready:]
        return shown
