"""The published code's own numbers: every file of a folder (`--golden DIR`) is checked by its metadata."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden_files import Golden, assert_close

from lin_jax.attention import TreeArrays, tree_arrays
from lin_jax.decoding import DraftTree, Generator, MedusaDrafter, NgramDrafter
from lin_jax.decoding.drafters import DraftContext
from lin_jax.hub.llama import write_llama
from lin_jax.models import Llama

FAMILIES = ("llama", "medusa")
DTYPES = ("float64", "float32")


@pytest.fixture
def golden(golden_file: Path, x64: None) -> Golden:
    golden = Golden.read(golden_file)
    if golden.family not in FAMILIES:
        pytest.skip(f"there is no {golden.family} model yet")
    return golden


@jax.jit
def forward(model: Llama, ids: jax.Array) -> jax.Array:
    return model(ids)


def loss_sum(model: Llama, inputs: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sum of the mean next-token cross entropies of all inputs, and each of them."""
    losses = {}
    for name, ids in inputs.items():
        logits = model(ids)[:, :-1]
        losses[name] = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()
    return sum(losses.values(), jnp.zeros(())), losses


def id_inputs(golden: Golden) -> dict[str, jax.Array]:
    return {name.removeprefix("ids_"): jnp.asarray(v) for name, v in golden.inputs.items() if name.startswith("ids_")}


@pytest.mark.holds("inputs/ids_")
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits(golden: Golden, dtype: str) -> None:
    inputs = id_inputs(golden)
    model = golden.llama(dtype)
    for name, ids in inputs.items():
        logits = forward(model, ids)
        assert_close(logits, golden.outputs[f"logits_{name}"], dtype)
        if f"loss_{name}" in golden.outputs:
            loss = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()
            assert_close(loss, golden.outputs[f"loss_{name}"], dtype)


@pytest.mark.holds("grads/")
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_and_gradients(golden: Golden, dtype: str) -> None:
    inputs = id_inputs(golden)
    model = golden.llama(dtype)
    gradients, losses = jax.jit(nnx.grad(loss_sum, has_aux=True))(model, inputs)
    for name, loss in losses.items():
        assert_close(loss, golden.outputs[f"loss_{name}"], dtype)
    found = write_llama(gradients, model)
    assert set(found) == set(golden.grads)
    for name, expected in golden.grads.items():
        if name.endswith("dwconv.weight"):
            # The published code zeroes the masked taps before each pass, so only the rest has a gradient to compare.
            kept = expected.shape[2] // 2 + 1
            assert_close(found[name][:, :, :kept], expected[:, :, :kept], dtype)
        else:
            assert_close(found[name], expected, dtype)


@jax.jit
def in_pieces(model: Llama, tokens: jax.Array) -> jax.Array:
    """Logits by a prefill of two pieces, then token by token."""
    batch, length = tokens.shape
    state, pieces, start = model.init_state(batch, length), [], 0
    for size in (length // 2, 3):
        hidden, state = model.prefill(tokens[:, start : start + size], jnp.full((batch,), size), state)
        pieces.append(hidden)
        start += size

    def step(state: Any, token: jax.Array) -> tuple[Any, jax.Array]:
        hidden, nodes = model.verify(token[:, None], tree_arrays((-1,)), state)
        state = model.commit(state, nodes, jnp.zeros((batch, 1), int), jnp.ones((batch,), int))
        return state, hidden[:, 0]

    single = jax.lax.scan(step, state, tokens[:, start:].T)[1]
    return model.logits(jnp.concatenate([*pieces, jnp.moveaxis(single, 0, 1)], axis=1))


@pytest.mark.holds("inputs/ids_")
@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_then_single_steps(golden: Golden, dtype: str) -> None:
    """Prefill in two pieces and go on token by token: the same logits as the whole sequence at once."""
    name, ids = max(id_inputs(golden).items(), key=lambda item: item[1].shape[1])
    assert_close(in_pieces(golden.llama(dtype), ids), golden.outputs[f"logits_{name}"], dtype)


def test_there_are_files(pytestconfig: pytest.Config) -> None:
    assert list(pytestconfig.getoption("golden").glob("*.safetensors"))


def decoding_inputs(golden: Golden, expected: str) -> dict[str, tuple[list[int], list[int]]]:
    """Prompts and exact greedy continuations, by suffix; `expected` is the prefix of the latter."""
    return {
        name.removeprefix("prompt_"): (value.tolist(), golden.outputs[expected + name.removeprefix("prompt_")].tolist())
        for name, value in golden.inputs.items()
        if name.startswith("prompt_") and expected + name.removeprefix("prompt_") in golden.outputs
    }


@pytest.mark.holds("outputs/full_tokens_")
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_greedy_decoding(golden: Golden, dtype: str) -> None:
    """Token by token, and with drafts by prompt lookup, all prompts in one batch: the exact continuation."""
    cases = decoding_inputs(golden, "full_tokens_")
    model = golden.llama(dtype)
    count = len(next(iter(cases.values()))[1])
    for drafter in (None, NgramDrafter(depth=min(5, golden.config["group_size"] - 1), longest=2)):
        generation = Generator(model, drafter=drafter, piece=7).generate([p for p, _ in cases.values()], count)
        assert generation.tokens == [tokens for _, tokens in cases.values()]
    for suffix, (prompt, tokens) in cases.items():
        ids = jnp.asarray([prompt + tokens])
        assert_close(forward(model, ids)[0, len(prompt) - 1 :], golden.outputs[f"full_logits_{suffix}"], dtype)


@pytest.mark.holds("outputs/greedy_full_tokens_")
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_tree_decoding(golden: Golden, dtype: str) -> None:
    """Medusa drafts in the file's tree: the exact greedy continuation, alone and in a batch of unequal rows."""
    cases = decoding_inputs(golden, "greedy_full_tokens_")
    tree = DraftTree(tuple(map(tuple, golden.config["tree"])))
    drafter = MedusaDrafter(golden.heads(dtype), width=golden.config["topk"])
    generator = Generator(golden.llama(dtype), drafter=drafter, tree=tree, piece=8)
    longest = max(len(tokens) for _, tokens in cases.values())
    together = generator.generate([prompt for prompt, _ in cases.values()], longest)
    for (prompt, tokens), found in zip(cases.values(), together.tokens, strict=True):
        assert found[: len(tokens)] == tokens
        assert generator.generate([prompt], len(tokens)).tokens == [tokens]
    assert together.mean_accepted_tokens > 1.5


@jax.jit
def prefill(model: Llama, ids: jax.Array) -> tuple[jax.Array, Any]:
    batch, length = ids.shape
    return model.prefill(ids, jnp.full((batch,), length), model.init_state(batch, 64))


@jax.jit
def verify(model: Llama, tokens: jax.Array, tree: TreeArrays, state: Any) -> jax.Array:
    return model.logits(model.verify(tokens, tree, state)[0])


@pytest.mark.holds("outputs/first_tree_tokens_")
@pytest.mark.parametrize("dtype", DTYPES)
def test_first_tree(golden: Golden, dtype: str) -> None:
    """The first tree's tokens, and every node's exact logits, also across the end of a group."""
    cases = decoding_inputs(golden, "first_tree_tokens_")
    model, heads = golden.llama(dtype), golden.heads(dtype)
    tree = DraftTree(tuple(map(tuple, golden.config["tree"])))
    drafter = MedusaDrafter(heads, width=golden.config["topk"])
    for suffix, (prompt, tokens) in cases.items():
        ids = jnp.asarray([prompt])
        hidden, state = prefill(model, ids)
        root = jnp.argmax(model.logits(hidden[:, -1]), axis=-1)
        context = DraftContext(hidden[:, -1], ids, jnp.asarray([len(prompt)]))
        drafted = tree.place(root, drafter.guess(context))
        if dtype == "float64":
            assert drafted[0].tolist() == tokens
        logits = verify(model, jnp.asarray([tokens]), tree.arrays(), state)
        assert_close(logits[0], golden.outputs[f"first_tree_full_forward_logits_{suffix}"], dtype)


@pytest.mark.holds(r"outputs/\w+_tree_indices")
def test_tree_tables(golden: Golden) -> None:
    """Ancestors, depths and root-to-leaf paths of every tree, as the published code numbers them."""
    trees = golden.config.get("trees") or {"buffers": golden.config.get("tree")}
    for name, paths in trees.items():
        tree = DraftTree(tuple(map(tuple, paths)))
        arrays = tree.arrays()
        assert np.array_equal(arrays.ancestors, golden.outputs[f"{name}_medusa_attn_mask"][0, 0])
        assert np.array_equal(arrays.depth, golden.outputs[f"{name}_medusa_position_ids"])
        ranks = [0, *(1 + golden.config["topk"] * (len(path) - 1) + path[-1] for path in tree.paths)]
        assert ranks == golden.outputs[f"{name}_tree_indices"].tolist()
        chains = np.asarray(tree.chains())
        for row in golden.outputs[f"{name}_retrieve_indices"]:
            nodes = row[row >= 0]
            assert chains[nodes[-1], : len(nodes)].tolist() == nodes.tolist()
