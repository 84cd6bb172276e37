"""Saved prefixes: continued as the whole texts are, refused by other models, full at their capacity."""

from pathlib import Path

import jax
import numpy as np
import pytest
from support.cells import cells
from support.samples import VOCABULARY, build_model

from lin_jax.decoding import DraftTree, Generator, ModelDrafter, NgramDrafter, Sampling, chain
from lin_jax.errors import UserError
from lin_jax.models import Llama

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module")
def model() -> Llama:
    with jax.enable_x64(True):
        return build_model()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, VOCABULARY, n).tolist() for n in (3, 11, 1, 8, 20)]


@pytest.mark.parametrize(
    "sampling", cells([Sampling(0.9, repetition_penalty=1.5)], [Sampling()]), ids=["penalised", "greedy"]
)
def test_a_prefix_is_read_once(model: Llama, prompts: list[list[int]], sampling: Sampling, tmp_path: Path) -> None:
    """Going on from it, also from a file, gives what the whole texts give, the drafter's own state included."""
    text = prompts[4]
    drafter = ModelDrafter(build_model("relu", seed=3))
    generator = Generator(model, drafter=drafter, tree=DraftTree(((0,), (1,), (0, 0))), prefill_chunk_size=32)
    whole = generator.generate([text + prompt for prompt in prompts[:2]], 12, sampling=sampling)
    prefix = generator.prefix(text, sampling=sampling)
    prefix.save(tmp_path / "prefix.safetensors")
    loaded = generator.load_prefix(tmp_path / "prefix.safetensors", sampling=sampling)
    for each in (prefix, loaded):
        found = generator.generate(prompts[:2], 12, sampling=sampling, prefix=each)
        assert found.tokens == whole.tokens
        assert found.accepted_histogram.tolist() == whole.accepted_histogram.tolist()
    alone = generator.generate([[], prompts[1]], 12, sampling=sampling, prefix=loaded)
    assert alone.tokens == generator.generate([text, text + prompts[1]], 12, sampling=sampling).tokens


def test_foreign_states_are_refused(model: Llama, tmp_path: Path) -> None:
    file = tmp_path / "prefix.safetensors"
    Generator(model, prefill_chunk_size=32).prefix([1, 2, 3]).save(file)
    with pytest.raises(UserError, match="another model"):
        Generator(build_model(seed=1), prefill_chunk_size=32).load_prefix(file)
    with pytest.raises(UserError, match="another model, drafter"):
        Generator(model, drafter=NgramDrafter(lookback=8), tree=chain(2), prefill_chunk_size=32).load_prefix(file)
    with pytest.raises(UserError, match="cannot read a state"):
        Generator(model).load_prefix(tmp_path / "missing")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot read a state"):
        Generator(model).load_prefix(file)
    with pytest.raises(UserError, match="cannot write"):
        Generator(model, prefill_chunk_size=32).prefix([1]).save(tmp_path / "no" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_growing_state_needs_room(prompts: list[list[int]]) -> None:
    softmax = Generator(build_model("softmax"), prefill_chunk_size=32)
    prefix = softmax.prefix(prompts[4], room=100)
    whole = softmax.generate([prompts[4] + prompts[0]], 9)
    assert softmax.generate([prompts[0]], 9, prefix=prefix).tokens == whole.tokens
    with pytest.raises(UserError, match="room"):
        softmax.generate([prompts[0]], 500, prefix=prefix)
