"""Numbers that overflow while a text is written, of finite weights: said in a line, wherever it happens."""

import jax.numpy as jnp
import pytest
from flax import nnx
from support.cells import some_of
from support.samples import build_model

from lin_jax.decoding import DraftTree, Generator, NgramDrafter, Sampling
from lin_jax.errors import UserError
from lin_jax.models import Llama

LIMIT = 3e38


def overflowing(part: str) -> Llama:
    """A model whose numbers overflow: of finite weights at once or in its head alone; as if so from token 5 on."""
    model = build_model(dtype="float32")
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name = "/".join(map(str, path))
        if (part, True) in (("layers", "down" in name), ("head", name.startswith("head"))):
            variable[...] = jnp.full_like(variable[...], LIMIT)
            nnx.update(model, nnx.from_flat_state([(path, variable)]))
    if part == "token":
        model.embed.embedding[...] = model.embed.embedding[...].at[5].set(jnp.inf)
    return model


@pytest.mark.parametrize("part", ["layers", "head"])
def test_a_first_token_of_no_numbers(part: str) -> None:
    with pytest.raises(UserError, match="the logits of prompt 1 have become NaN or infinite within 1 tokens"):
        Generator(overflowing(part)).generate([[1, 2]], 4)


@pytest.mark.parametrize("drafts", some_of([True, False], 1))
def test_in_the_middle_of_a_text(drafts: bool) -> None:
    """One of two prompts comes to the token; the other, alone, does not."""
    options = {"drafter": NgramDrafter(lookback=8), "tree": DraftTree(((0,), (0, 0)))} if drafts else {}
    generator = Generator(overflowing("token"), **options)
    sampling = Sampling(1.0)
    plain = Generator(build_model(dtype="float32")).generate([[1], [2]], 40, sampling=sampling).tokens
    first = [row.index(5) if 5 in row else None for row in plain]
    reached = [index for index in first if index is not None]
    assert reached, "a text comes to the token"
    with pytest.raises(UserError, match="NaN or infinite") as caught:
        generator.generate([[1], [2]], 40, sampling=sampling)
    assert "\n" not in str(caught.value)
    # Before it, all is as it was.
    few = min(reached)
    assert generator.generate([[1], [2]], max(few, 1), sampling=sampling).tokens == [
        row[: max(few, 1)] for row in plain
    ]
