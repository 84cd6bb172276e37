"""Calibration prompts for speculation plans: held-out text of the model's own data, or sampled from the model."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice

from lin_jax.data import DataConfig, Tokenizer, read_documents, split_documents
from lin_jax.decoding.engine.sampling import Sampling
from lin_jax.decoding.generator import Generator
from lin_jax.errors import UserError

# Tokens of a prompt, and number of prompts.
PROMPT_TOKENS, PROMPTS = 64, 24
# Bytes of the model's data that are read for them at most.
MAX_BYTES = 16_000_000


def held_out_prompts(
    config: DataConfig, tokenizer: Tokenizer, min_count: int, most: int | None = None
) -> list[list[int]]:
    """First `PROMPT_TOKENS` tokens of each held-out document, then pieces from further on in them.

    Args:
        config: the data.
        tokenizer: the model's.
        min_count: number of prompts that are needed.
        most: number of prompts at most, for which no more documents are encoded than need be; None gives all.

    Raises:
        UserError: the text cannot be read, or gives fewer than `min_count` prompts.
    """
    _, documents = split_documents(read_documents(config), config.validation_fraction)

    @cache
    def encoded(number: int) -> list[int]:
        return tokenizer.encode(documents[number].text).tolist()

    def all_pieces() -> Iterator[list[int]]:
        for begin in range(0, 40 * PROMPT_TOKENS, 4 * PROMPT_TOKENS):
            for number in range(len(documents)):
                piece = encoded(number)[begin : begin + PROMPT_TOKENS]
                if len(piece) == PROMPT_TOKENS:
                    yield piece

    pieces = list(islice(all_pieces(), most))
    if len(pieces) < min_count:
        raise UserError(f"the held-out text of {config.name} is too short for {min_count} prompts; give more text")
    return pieces


def calibration_prompts(
    data: DataConfig | None, generator: Generator, tokenizer: Tokenizer, empty: Sequence[int]
) -> list[list[int]]:
    """Default prompts for choosing draft trees.

    Held-out text, if the model's data is given and can be read here. Else the model samples prompts: its greedy text
    continues them more repetitively than real ones, which flatters drafts; `SpeculationFallback` corrects for it.

    Args:
        data: configuration of the data that the model was trained on; None if it is unknown.
        generator: generator for plain decoding.
        tokenizer: the model's.
        empty: token ids of the empty prompt.
    """
    if data is not None and not data.is_hub and not data.streaming:
        try:
            limited = replace(data, max_bytes=min(data.max_bytes or MAX_BYTES, MAX_BYTES))
            found = held_out_prompts(limited, tokenizer, PROMPTS)
            # Beginnings of documents and pieces from further on in equal measure.
            return found[:: len(found) // PROMPTS][:PROMPTS]
        except UserError:
            # The text is gone, or too short.
            pass
    return generator.generate([empty] * PROMPTS, PROMPT_TOKENS, sampling=Sampling(1.0)).tokens
