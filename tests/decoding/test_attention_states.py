"""Every kind of state decodes and speculates: a LLaMA's drafts leave the plain output, in float64.

All attentions verify and commit trees in tests/attention; benchmarks/support_matrix.py decodes with all of them.
"""

from typing import Any

import jax
import pytest
from support.cells import cells
from support.samples import NEW, TREE, KnowingDrafter, build_model, padded

from lin_jax.attention import REGISTRY, AttentionConfig
from lin_jax.decoding import Generator, Sampling

# Sinks before a memory that decays, and before nothing but a window.
WINDOWED = {"name": "hedgehog+window", "window": 5, "decay": "token", "sinks": 3}
SINKS = AttentionConfig(pattern=(WINDOWED, {"name": "softmax", "window": 4, "sinks": 2}))
NAMES = cells(
    [SINKS],
    ["rfa+convolution", "linformer", "flash", "yoso", "transnormer", "relu", "square", "linformer+local+convolution"],
)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5], [3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2]]
pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("name", NAMES)
def test_speculation_is_lossless(name: str | AttentionConfig) -> None:
    model = build_model(name)
    plain = Generator(model, prefill_chunk_size=8).generate(PROMPTS, NEW, sampling=Sampling(1.0), seed=5)
    truth = padded(PROMPTS, plain.tokens)
    drafter = KnowingDrafter(truth, seed=1, right=0.8)
    drafted = Generator(model, drafter=drafter, tree=TREE, prefill_chunk_size=8).generate(
        PROMPTS, NEW, sampling=Sampling(1.0), seed=5
    )
    assert drafted.tokens == plain.tokens
    assert drafted.mean_accepted_tokens > 1.3
    assert len({tuple(tokens) for tokens in plain.tokens}) == len(PROMPTS)


@pytest.mark.parametrize("name", [name for name, entry in REGISTRY.items() if not entry.growing])
def test_states_do_not_grow(name: str) -> None:
    model = jax.eval_shape(lambda: build_model(name))
    sizes = {sum(leaf.size for leaf in jax.tree.leaves(abstract_state(model, capacity))) for capacity in (8, 4096)}
    assert len(sizes) == 1


def abstract_state(model: Any, capacity: int) -> Any:
    return jax.eval_shape(lambda: model.init_state(1, capacity))
