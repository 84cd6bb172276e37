"""Beginnings of texts to choose drafts by: held-out text of the model's own run, or what the model writes itself."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lin_jax.data import DataConfig, Tokenizer, read_documents, split_documents
from lin_jax.decoding.generator import Generator
from lin_jax.decoding.sampling import Sampling
from lin_jax.errors import UserError

# Tokens of a beginning, and how many beginnings a choice is made by.
PROMPT_TOKENS, PROMPTS = 64, 24
# How much of a run's text is read for them.
MOST_BYTES = 16_000_000


def held_out_prompts(config: DataConfig, tokenizer: Tokenizer, least: int) -> list[list[int]]:
    """Beginnings of the held-out documents, `PROMPT_TOKENS` each, then pieces from further on in them.

    Raises:
        UserError: the text cannot be read, or yields fewer than `least`.
    """
    _, documents = split_documents(read_documents(config), config.validation_fraction)
    texts = [tokenizer.encode(document.text).tolist() for document in documents]
    places = range(0, 40 * PROMPT_TOKENS, 4 * PROMPT_TOKENS)
    pieces = [text[begin : begin + PROMPT_TOKENS] for begin in places for text in texts]
    pieces = [piece for piece in pieces if len(piece) == PROMPT_TOKENS]
    if len(pieces) < least:
        raise UserError(f"the held-out text of {config.name} is too short for {least} prompts; give more text")
    return pieces


def calibration_prompts(
    folder: Path, generator: Generator, tokenizer: Tokenizer, empty: Sequence[int]
) -> list[list[int]]:
    """What texts go on from by which drafts are chosen for a model, if nobody says.

    Of a run whose text lies at hand, held-out text. Else the model draws beginnings: its greedy text goes on from them
    more repetitively than from real ones, which flatters drafts, as the loop will notice (`pacing`).

    Args:
        folder: the run's folder, or another one that holds the model.
        generator: plain decoding.
        tokenizer: the model's.
        empty: the prompt to write from nothing.
    """
    from lin_jax.training.config import CONFIG_FILE, load_run_config

    if (folder / CONFIG_FILE).exists():
        config = load_run_config(folder).data
        if not config.is_hub and not config.streaming:
            try:
                limited = replace(config, max_bytes=min(config.max_bytes or MOST_BYTES, MOST_BYTES))
                found = held_out_prompts(limited, tokenizer, PROMPTS)
                # Beginnings and pieces from further on alike.
                return found[:: len(found) // PROMPTS][:PROMPTS]
            except UserError:
                # The text has gone, or is too short.
                pass
    return generator.generate([empty] * PROMPTS, PROMPT_TOKENS, sampling=Sampling(1.0)).tokens
