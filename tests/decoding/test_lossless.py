"""Speculative output is plain output, token for token, in float64: greedy and sampled, whatever the drafts are."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.attention import AttentionConfig
from lin_jax.decoding import (
    DraftTree,
    Generator,
    MedusaDrafter,
    NgramDrafter,
    Sampling,
    UnionDrafter,
    chain,
)
from lin_jax.decoding.drafters import DraftContext
from lin_jax.decoding.loop import DRAFT, TARGET, run
from lin_jax.models import Llama, LlamaConfig, MedusaHeads

pytestmark = pytest.mark.usefixtures("x64")
GROUP = 8
NEW = 37
TREE = DraftTree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 0, 0), (1, 0, 0)))
SAMPLINGS = {
    "greedy": Sampling(),
    "sampled": Sampling(1.0),
    "filtered": Sampling(0.8, top_k=9, top_p=0.9),
}


def build_model(name: str = "augmented", seed: int = 0) -> Llama:
    config = LlamaConfig(
        vocab_size=29,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        initializer_range=0.5,
        attention=AttentionConfig(name, GROUP, 7, initial_alpha=0.4),
        dtype="float64",
        param_dtype="float64",
    )
    return Llama(config, rngs=nnx.Rngs(seed))


class KnowingDrafter(nnx.Module):
    """Knows what plain decoding will say, and guesses it at ranks and up to depths that change from place to place."""

    depth = 4
    width = 3

    def __init__(self, truth: np.ndarray, seed: int, right: float) -> None:
        self.truth = nnx.Variable(jnp.asarray(truth, jnp.int32))
        rng = np.random.default_rng(seed)
        self.rank = nnx.Variable(jnp.asarray(rng.integers(0, 3, truth.shape)))
        self.right = nnx.Variable(jnp.asarray(rng.random(truth.shape) < right))

    def guess(self, context: DraftContext) -> jax.Array:
        ahead = jnp.minimum(context.length[:, None] + jnp.arange(self.depth), self.truth.shape[1] - 1)
        token, rank, right = (
            jnp.take_along_axis(table[...], ahead, axis=1)[:, :, None] for table in (self.truth, self.rank, self.right)
        )
        wrong = (token + 1 + jnp.arange(self.width)) % 29
        return jnp.where((jnp.arange(self.width) == rank) & right, token, wrong)


@pytest.fixture(scope="module", params=["augmented", "softmax"])
def model(request: pytest.FixtureRequest) -> Any:
    with jax.enable_x64(True):
        yield build_model(request.param)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 29, n).tolist() for n in (1, GROUP - 1, GROUP, 2 * GROUP + 3, 30)]


def padded(prompts: list[list[int]], continuations: list[list[int]]) -> np.ndarray:
    rows = [[*p, *c] for p, c in zip(prompts, continuations, strict=True)]
    return np.array([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])


def drafters(model: Llama, truth: np.ndarray) -> dict[str, tuple[Any, DraftTree]]:
    heads = MedusaHeads.on(model, 4)
    both = UnionDrafter(MedusaDrafter(heads, width=2), NgramDrafter(depth=4))
    return {
        "always wrong": (KnowingDrafter(truth, 0, 0.0), TREE),
        "always right": (KnowingDrafter(truth, 1, 1.0), TREE),
        "half right": (KnowingDrafter(truth, 2, 0.6), TREE),
        "ngram": (NgramDrafter(depth=5), chain(5)),
        "medusa and ngram": (both, DraftTree(((0,), (1,), (2,), (0, 0), (2, 2), (2, 2, 2), (0, 0, 1)))),
    }


@pytest.mark.parametrize("mode", SAMPLINGS)
def test_equals_plain_decoding(model: Llama, prompts: list[list[int]], mode: str) -> None:
    sampling = SAMPLINGS[mode]
    plain = Generator(model, piece=16).generate(prompts, NEW, sampling=sampling, seed=3)
    assert plain.mean_accepted_tokens == 1
    if mode != "greedy":
        other = Generator(model, piece=16).generate(prompts, NEW, sampling=sampling, seed=4)
        assert other.tokens != plain.tokens
    for name, (drafter, tree) in drafters(model, padded(prompts, plain.tokens)).items():
        generator = Generator(model, drafter=drafter, tree=tree, piece=16)
        found = generator.generate(prompts, NEW, sampling=sampling, seed=3)
        assert found.tokens == plain.tokens, name
        for row, steps in zip(found.origins, found.steps, strict=True):
            # Every step adds one token of the target's own, but the limit may cut the last one off.
            assert steps + 1 - row.count(TARGET) in (0, 1)
            assert row.count(TARGET) + row.count(DRAFT) == NEW
        if name == "always wrong":
            assert found.mean_accepted_tokens == 1
        if name == "always right":
            assert found.mean_accepted_tokens > 1.8


def test_rows_do_not_depend_on_the_batch(prompts: list[list[int]]) -> None:
    """A prompt gives the same tokens alone, in a batch, and at another place of it."""
    model = build_model()
    sampling = SAMPLINGS["sampled"]
    generator = Generator(model, drafter=NgramDrafter(depth=3), piece=16)
    together = generator.generate(prompts, 12, sampling=sampling, seed=1).tokens
    for row, prompt in enumerate(prompts):
        assert generator.generate([prompt], 12, sampling=sampling, seed=1, first_row=row).tokens == [together[row]]


def test_stops_inside_an_accepted_run(prompts: list[list[int]]) -> None:
    """An end token or the length limit cuts an accepted run, row by row, and nothing follows it."""
    model = build_model()
    free = Generator(model, piece=16).generate(prompts, NEW).tokens
    ends = (free[0][5], free[3][9])
    expected = [row[: min((row.index(e) + 1 for e in ends if e in row), default=NEW)] for row in free]
    assert len({len(row) for row in expected}) > 1
    for right in (0.0, 0.7, 1.0):
        drafter = KnowingDrafter(padded(prompts, free), 7, right)
        found = Generator(model, drafter=drafter, tree=TREE, end_tokens=ends, piece=16).generate(prompts, NEW)
        assert found.tokens == expected
        for count in (1, 2, 3, 4):
            short = Generator(model, drafter=drafter, tree=TREE, piece=16).generate(prompts, count)
            assert short.tokens == [row[:count] for row in free]


def test_state_is_that_of_plain_decoding(prompts: list[list[int]]) -> None:
    """When rows have written as much, their states are equal, whatever was accepted on the way."""
    model = build_model()
    plain = Generator(model, piece=16)
    truth = padded(prompts, plain.generate(prompts, NEW).tokens)
    for right in (0.0, 0.5, 1.0):
        drafter = KnowingDrafter(truth, 11, right)
        speculative = Generator(model, drafter=drafter, tree=TREE, piece=16)
        states = []
        for generator in (plain, speculative):
            begun = generator.begin(prompts, NEW, Sampling(), 0, 0)
            states.append(generator.advance(begun, Sampling(), NEW))
        one, other = states
        np.testing.assert_array_equal(one.model.position, other.model.position)
        np.testing.assert_allclose(one.model.memory, other.model.memory, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(one.model.window, other.model.window, rtol=1e-12, atol=1e-12)
        used = jnp.arange(GROUP) < one.model.position[..., None] % GROUP
        for part in ("keys", "values"):
            a, b = (jnp.where(used[..., None, None], getattr(s.model, part), 0) for s in states)
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_stream_equals_generate(prompts: list[list[int]]) -> None:
    model = build_model()
    generator = Generator(model, drafter=NgramDrafter(depth=3), piece=16)
    parts = list(generator.stream(prompts[2], NEW, steps_per_visit=3))
    whole = generator.generate([prompts[2]], NEW)
    assert [t for part in parts for t in part.tokens[0]] == whole.tokens[0]
    assert [o for part in parts for o in part.origins[0]] == whole.origins[0]
    assert whole.origins[0][0] == TARGET
    assert sum(part.steps[0] for part in parts) == whole.steps[0]
    assert len(parts) > 3


def test_lengths_share_compiled_programs() -> None:
    """Prompts of many lengths compile the loop once."""
    model = build_model()
    generator = Generator(model, drafter=NgramDrafter(depth=2), piece=16)
    generator.generate([[1, 2, 3]], 8)
    before = run._cache_size()
    for length in (1, 5, 17, 40):
        generator.generate([[1] * length], 5)
    assert run._cache_size() == before


def test_state_size_does_not_grow() -> None:
    model = build_model()
    generator = Generator(model, piece=16)
    assert generator.generate([[1] * 3], 2).state_bytes == generator.generate([[1] * 300], 2).state_bytes
    softmax = Generator(build_model("softmax"), piece=16)
    assert softmax.generate([[1] * 3], 2).state_bytes < softmax.generate([[1] * 300], 2).state_bytes


def test_unrolled_layers_decode_alike(prompts: list[list[int]]) -> None:
    model = build_model()
    unrolled = Llama(replace(model.config, unroll=2), rngs=nnx.Rngs(0))
    assert (
        Generator(unrolled, piece=16).generate(prompts, 9).tokens
        == Generator(model, piece=16).generate(prompts, 9).tokens
    )
