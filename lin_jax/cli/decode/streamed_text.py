"""A text as it comes, up to a stop string that must not be shown."""

from collections.abc import Sequence

from lin_jax.data import StreamDecoder, Tokenizer
from lin_jax.decoding.engine.stop_strings import cut_at_stop


class StreamedText:
    """Turns tokens into text, piece by piece, and ends it where a stop string begins.

    Text that may yet turn out to be the beginning of a stop string waits for what follows.

    Args:
        tokenizer: gives the text of tokens.
        stops: stop strings.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens=True)
        self._stops = tuple(stops)
        self._held = max((len(stop) for stop in stops), default=1) - 1
        self._waiting = ""
        self._ended = False

    def push(self, tokens: Sequence[int]) -> str:
        """Takes the next tokens, and returns the text that is certain to be shown."""
        return self._release(self._decoder.push(tokens), self._held)

    def flush(self) -> str:
        """The rest of the text."""
        return self._release(self._decoder.flush(), 0)

    def _release(self, text: str, held: int) -> str:
        if self._ended:
            return ""
        self._waiting += text
        shown = cut_at_stop(self._waiting, self._stops)
        if len(shown) < len(self._waiting):
            self._ended = True
            return shown
        ready = len(shown) - held if held else len(shown)
        self._waiting = shown[max(ready, 0) :]
        return shown[: max(ready, 0)]
