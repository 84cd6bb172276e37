"""Speed and memory of a model on this machine: tokens read and written a second, and bytes of state and weights."""

import argparse
import resource
import sys
from typing import Any

import jax
import numpy as np

from lin_jax.devices import devices_shown
from lin_jax.hub.sizes import context_length, parameter_count, state_bytes
from lin_jax.models.stored_weights import weight_bytes
from lin_jax.progress_bar import progress_bar
from lin_jax.session import Session

# Tokens of a prompt where neither the model nor the caller says more; and how often everything is timed.
PROMPT, ROUNDS = 512, 3


def speed_report(options: argparse.Namespace, subject: Any) -> dict[str, Any]:
    """Tokens a second without drafts, the best of some rounds after one that compiles; and bytes."""
    session = Session.of(subject.model, subject.tokenizer, ())
    length = options.sequence_length or min(PROMPT, context_length(subject.model.config) or PROMPT)
    bound = getattr(subject.model.config, "max_positions", None)
    if bound is not None:
        length = max(min(length, bound - options.new_tokens), 1)
    chance = np.random.default_rng(0)
    prompts = chance.integers(0, subject.model.config.vocab_size, (options.batch, length)).tolist()
    generator = session.generator("none", session.plain_plan().shape)
    with progress_bar(total=1 + ROUNDS, desc="measuring", unit="round") as bar:
        found = []
        for _ in range(1 + ROUNDS):
            found.append(generator.generate(prompts, options.new_tokens, slots=options.batch))
            bar.update()
    timed = found[1:]
    return {
        "read_tokens_per_second": options.batch * length / min(each.prefill_seconds for each in timed),
        "write_tokens_per_second": max(each.tokens_per_second for each in timed),
        "batch": options.batch,
        "prompt_tokens": length,
        "new_tokens": options.new_tokens,
        "state_bytes": state_bytes(subject.model, length + options.new_tokens),
        "weight_bytes": weight_bytes(session.model),
        "parameters": parameter_count(subject.model),
        "device": devices_shown(),
    }


def peak_memory_bytes() -> int:
    """Most memory in use so far: of the first device, or on a CPU of the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats and jax.default_backend() != "cpu":
        return int(stats["peak_bytes_in_use"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
