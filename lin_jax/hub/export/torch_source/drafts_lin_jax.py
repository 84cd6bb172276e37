"""Guesses of the next tokens: what followed the same words earlier in the text, or what Medusa heads say."""

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import cached_file

HEADS_FILE = "medusa_lm_head.safetensors"


class NGrams:
    """Finds what followed the last tokens of a text where they stood before, the longest run of them first.

    Args:
        tokens: the text so far.
        longest: tokens of the longest run that is looked for.
        shortest: of the shortest.
    """

    def __init__(self, tokens: Sequence[int], longest: int = 4, shortest: int = 2) -> None:
        self.sizes = range(longest, shortest - 1, -1)
        self.tokens: list[int] = []
        self.follows: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds tokens behind the text."""
        for token in tokens:
            # Runs that end before this token: their continuation begins with it.
            for size in self.sizes:
                if len(self.tokens) >= size:
                    self.follows[tuple(self.tokens[-size:])] = len(self.tokens)
            self.tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """At most so many tokens that may come next; none if the last tokens are new.

        A continuation that reaches the end of the text goes on from its own beginning, as text that turns in a circle.
        """
        for size in self.sizes:
            place = self.follows.get(tuple(self.tokens[-size:])) if len(self.tokens) >= size else None
            if place is not None and most > 0:
                run = self.tokens[place : place + most]
                return (run * -(-most // len(run)))[:most]
        return []


class DraftHeads:
    """Medusa heads: head m gives `W1 (h + silu(W0 h + b0))`, logits of the token m + 2 after the position of h.

    Args:
        tensors: `M.0.linear.weight` `[E, E]`, `M.0.linear.bias` `[E]` and `M.1.weight` `[V, E]` of every head M.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        count = 1 + max(int(name.split(".")[0]) for name in tensors)
        names = ("0.linear.weight", "0.linear.bias", "1.weight")
        self.heads = [tuple(tensors[f"{head}.{name}"] for name in names) for head in range(count)]

    @classmethod
    def beside(cls, model: nn.Module) -> "DraftHeads | None":
        """The heads in the folder that a model was opened from, in its type and on its device; None without any."""
        place = model.name_or_path
        if getattr(model.config, "medusa_num_heads", None) is None or not place:
            return None
        file = (
            Path(place) / HEADS_FILE
            if Path(place).is_dir()
            else cached_file(place, HEADS_FILE, revision=model.config._commit_hash)
        )
        return cls({name: tensor.to(model.device, model.dtype) for name, tensor in load_file(file).items()})

    def draft(self, hidden: Tensor, most: int) -> list[int]:
        """The likeliest token of each head, at most so many.

        Args:
            hidden: `[E]` what the model's own head reads at the last token but one.
            most: how many.
        """
        found = []
        for weight, bias, output in self.heads[:most]:
            block = nn.functional.silu(nn.functional.linear(hidden, weight, bias))
            found.append(int(nn.functional.linear(hidden + block, output).argmax()))
        return found
