"""The published code's own numbers: every file of a folder (`--golden DIR`) is checked by its metadata."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.cells import cells
from support.golden_files import Golden, assert_close
from support.golden_models_gpt2_flash import flash, gpt2, gpt2_classifier
from support.golden_models_t5 import t5, t5_classifier

from lin_jax.attention import TreeArrays, tree_arrays
from lin_jax.decoding import DraftTree, Generator, MedusaDrafter, NgramDrafter
from lin_jax.decoding.acceptance.longest_path import longest_path
from lin_jax.decoding.drafting.api import Draft, DraftContext
from lin_jax.hub.families.flash import entries as flash_entries
from lin_jax.hub.families.gpt2 import entries as gpt2_entries
from lin_jax.hub.families.llama import entries as llama_entries
from lin_jax.hub.families.t5 import entries as t5_entries
from lin_jax.hub.tensors import named
from lin_jax.models import T5, Llama, T5Classifier
from lin_jax.models.causal import CausalModel

CAUSAL = ("llama", "medusa", "gpt2", "flash")
FAMILIES = (*CAUSAL, "t5")
ENTRIES = {"llama": llama_entries, "medusa": llama_entries, "gpt2": gpt2_entries, "flash": flash_entries}
DTYPES = ("float64", "float32")


@pytest.fixture
def golden(golden_file: Path, x64: None) -> Golden:
    golden = Golden.read(golden_file)
    if golden.family not in FAMILIES:
        pytest.skip(f"there is no {golden.family} model yet")
    return golden


def build(golden: Golden, dtype: str) -> Any:
    """The file's model of text, in the given type."""
    if golden.family in ("gpt2", "flash"):
        return (gpt2 if golden.family == "gpt2" else flash)(golden, dtype)
    return golden.llama(dtype)


@jax.jit
def forward(model: Any, ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    return model(ids, mask=mask)


def loss_sum(model: Any, inputs: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sum of the mean next-token cross entropies of all inputs, and each of them."""
    losses = {}
    for name, ids in inputs.items():
        logits = model(ids)[:, :-1]
        losses[name] = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()
    return sum(losses.values(), jnp.zeros(())), losses


def id_inputs(golden: Golden) -> dict[str, jax.Array]:
    return {name.removeprefix("ids_"): jnp.asarray(v) for name, v in golden.inputs.items() if name.startswith("ids_")}


def mask_of(golden: Golden, name: str) -> jax.Array | None:
    """The mask of an input; the published linear GPT-2 pays no heed to its own."""
    mask = golden.inputs.get(f"mask_{name}")
    if golden.settings.get("softmax"):
        mask = golden.inputs.get(f"attention_mask_{name}", mask)
    return None if mask is None else jnp.asarray(mask)


LOGITS = (
    *("flash-augmented", "flash-encoder-mask", "flash-softmax", "gpt2-augmented", "gpt2-softmax"),
    *("llama-augmented-gqa", "llama-augmented-k63", "llama-castling", "llama-softmax", "llama-yoso"),
)


@pytest.mark.users_settings("llama-augmented-gqa-float64")
@pytest.mark.always(*LOGITS)
@pytest.mark.holds("inputs/ids_")
@pytest.mark.family(*CAUSAL)
@pytest.mark.parametrize("dtype", cells(DTYPES[:1], DTYPES[1:]))
def test_logits(golden: Golden, dtype: str) -> None:
    inputs = id_inputs(golden)
    model = build(golden, dtype)
    for name, ids in inputs.items():
        logits = forward(model, ids, mask_of(golden, name))
        assert_close(logits, golden.outputs[f"logits_{name}"], dtype)
        if f"loss_{name}" in golden.outputs:
            loss = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()
            assert_close(loss, golden.outputs[f"loss_{name}"], dtype)


@pytest.mark.always("gpt2-augmented", "gpt2-softmax")
@pytest.mark.holds("outputs/classification_logits_")
@pytest.mark.family("gpt2")
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpt2_classification(golden: Golden, dtype: str) -> None:
    """Scores at the last token before the padding; the mask changes nothing there, since padding comes after it."""
    model = gpt2_classifier(golden, dtype)
    logits = jax.jit(type(model).__call__)(model, golden.inputs["ids_pad"], golden.inputs["attention_mask_pad"])
    assert_close(logits, golden.outputs["classification_logits_pad"], dtype)


@pytest.mark.always("llama-augmented-gqa", "flash-augmented")
@pytest.mark.holds("grads/")
@pytest.mark.family(*CAUSAL)
@pytest.mark.parametrize("dtype", DTYPES[:1])
def test_losses_and_gradients(golden: Golden, dtype: str) -> None:
    inputs = {name: ids for name, ids in id_inputs(golden).items() if f"loss_{name}" in golden.outputs}
    model = build(golden, dtype)
    gradients, losses = jax.jit(nnx.grad(loss_sum, has_aux=True))(model, inputs)
    for name, loss in losses.items():
        assert_close(loss, golden.outputs[f"loss_{name}"], dtype)
    found = named(gradients, ENTRIES[golden.family](model))
    assert set(found) == set(golden.grads)
    for name, expected in golden.grads.items():
        if name.endswith(("dwconv.weight", "dconv_ada.weight")):
            # The published code zeroes the masked taps before each pass, so only the rest has a gradient to compare.
            kept = expected.shape[2] // 2 + 1
            assert_close(found[name][:, :, :kept], expected[:, :, :kept], dtype)
        else:
            assert_close(found[name], expected, dtype)


@jax.jit
def in_pieces(model: CausalModel, tokens: jax.Array) -> jax.Array:
    """Logits by a prefill of two pieces, then token by token."""
    batch, length = tokens.shape
    size = length // 2 - 2

    def piece(state: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        hidden, state = model.prefill(tokens, jnp.full((batch,), size), state)
        return state, hidden

    def step(state: Any, token: jax.Array) -> tuple[Any, jax.Array]:
        hidden, nodes = model.verify(token[:, None], tree_arrays((-1,)), state)
        state = model.commit(state, nodes, jnp.zeros((batch, 1), int), jnp.ones((batch,), int))
        return state, hidden[:, 0]

    pieces = jnp.stack([tokens[:, :size], tokens[:, size : 2 * size]])
    state, read = jax.lax.scan(piece, model.init_state(batch, length), pieces)
    single = jax.lax.scan(step, state, tokens[:, 2 * size :].T)[1]
    return model.logits(jnp.concatenate([*read, jnp.moveaxis(single, 0, 1)], axis=1))


def assert_pieces_are_the_whole(golden: Golden, dtype: str) -> None:
    inputs = {name: ids for name, ids in id_inputs(golden).items() if mask_of(golden, name) is None}
    name, ids = max(inputs.items(), key=lambda item: item[1].shape[1])
    assert_close(in_pieces(build(golden, dtype), ids), golden.outputs[f"logits_{name}"], dtype)


@pytest.mark.always("llama-augmented-k63", "llama-yoso")
@pytest.mark.holds("inputs/ids_")
@pytest.mark.family("llama", "medusa")
@pytest.mark.parametrize("dtype", DTYPES[:1])
def test_pieces_then_single_steps(golden: Golden, dtype: str) -> None:
    """Prefill in two pieces and go on token by token: the same logits as the whole sequence at once."""
    assert_pieces_are_the_whole(golden, dtype)


@pytest.mark.holds("outputs/loss_")
@pytest.mark.family("gpt2", "flash")
@pytest.mark.parametrize("dtype", DTYPES[:1])
def test_pieces_of_other_models(golden: Golden, dtype: str) -> None:
    """The same for the fullest of each model's attentions; the others are those of LLaMA."""
    assert_pieces_are_the_whole(golden, dtype)


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
@pytest.mark.parametrize("dtype", cells(["float64"], ["float32"]))
def test_exact_greedy_decoding(golden: Golden, dtype: str) -> None:
    """Token by token, and with drafts by prompt lookup, all prompts in one batch: the exact continuation."""
    cases = decoding_inputs(golden, "full_tokens_")
    model = golden.llama(dtype)
    count = len(next(iter(cases.values()))[1])
    for drafter in (None, NgramDrafter(depth=min(5, golden.config["group_size"] - 1), lookback=64)):
        generation = Generator(model, drafter=drafter, prefill_chunk_size=7).generate(
            [p for p, _ in cases.values()], count
        )
        assert generation.tokens == [tokens for _, tokens in cases.values()]
    for suffix, (prompt, tokens) in cases.items():
        ids = jnp.asarray([prompt + tokens])
        assert_close(forward(model, ids)[0, len(prompt) - 1 :], golden.outputs[f"full_logits_{suffix}"], dtype)


@pytest.mark.always("medusa-small")
@pytest.mark.holds("outputs/greedy_full_tokens_")
@pytest.mark.parametrize("dtype", cells(["float64"], ["float32"]))
def test_exact_tree_decoding(golden: Golden, dtype: str) -> None:
    """Medusa drafts in the file's tree: the exact greedy continuation, alone and in a batch of unequal rows."""
    cases = decoding_inputs(golden, "greedy_full_tokens_")
    tree = DraftTree(tuple(map(tuple, golden.config["tree"])))
    drafter = MedusaDrafter(golden.heads(dtype), width=golden.config["topk"])
    generator = Generator(golden.llama(dtype), drafter=drafter, tree=tree, prefill_chunk_size=8)
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


@pytest.mark.thorough
@pytest.mark.always("medusa-mc63")
@pytest.mark.holds("outputs/first_tree_tokens_")
@pytest.mark.parametrize("dtype", cells(["float64"], ["float32"]))
def test_first_tree(golden: Golden, dtype: str) -> None:
    """The first tree's tokens, and every node's exact logits, also across the end of a group."""
    cases = decoding_inputs(golden, "first_tree_tokens_")
    model, heads = golden.llama(dtype), golden.heads(dtype)
    tree = DraftTree(tuple(map(tuple, golden.config["tree"])))
    drafter = MedusaDrafter(heads, width=golden.config["topk"])
    grow = jax.jit(lambda context: tree.grow(drafter, context, None))
    for suffix, (prompt, tokens) in cases.items():
        ids = jnp.asarray([prompt])
        hidden, state = prefill(model, ids)
        root = jnp.argmax(model.logits(hidden[:, -1]), axis=-1)
        context = DraftContext(root, hidden[:, -1], jnp.zeros((1, 0), int))
        drafted = grow(context).tokens
        if dtype == "float64":
            assert drafted[0].tolist() == tokens
        logits = verify(model, jnp.asarray([tokens]), tree.arrays(), state)
        assert_close(logits[0], golden.outputs[f"first_tree_full_forward_logits_{suffix}"], dtype)


@pytest.mark.holds(r"outputs/\w+_tree_indices")
def test_tree_tables(golden: Golden) -> None:
    """Ancestors, depths and root-to-leaf paths of every tree, as the published code numbers them."""
    trees = golden.config.get("trees") or {"buffers": golden.config.get("tree")}
    longest = jax.jit(longest_path, static_argnums=3)
    for name, paths in trees.items():
        tree = DraftTree(tuple(map(tuple, paths)))
        arrays = tree.arrays()
        assert np.array_equal(arrays.ancestors, golden.outputs[f"{name}_medusa_attn_mask"][0, 0])
        assert np.array_equal(arrays.depth, golden.outputs[f"{name}_medusa_position_ids"])
        ranks = [0, *(1 + golden.config["topk"] * (len(path) - 1) + path[-1] for path in tree.paths)]
        assert ranks == golden.outputs[f"{name}_tree_indices"].tolist()
        nothing = np.zeros((1, tree.size), int)
        draft = Draft(nothing, np.asarray([(0, *tree.parents[1:])]), arrays)
        for row in golden.outputs[f"{name}_retrieve_indices"]:
            nodes = row[row >= 0]
            stands = np.isin(np.arange(tree.size), nodes)[None]
            accepted = longest(draft, stands, nothing, tree.depth + 1)
            assert accepted.path[0, : len(nodes)].tolist() == nodes.tolist()


@jax.jit
def read_and_write(model: T5, ids: jax.Array, decoder_ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the encoder makes of its rows, and the logits behind them."""
    return model.encode(ids, mask), model(ids, decoder_ids, mask)


@jax.jit
def classify(model: T5Classifier, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return model(ids, mask)


def t5_inputs(golden: Golden, *names: str) -> list[np.ndarray]:
    """Source, decoder input and mask of the named inputs, as one batch."""
    ids = [golden.inputs[f"ids_{name}"] for name in names]
    decoder_ids = [golden.inputs[f"decoder_ids_{name}"] for name in names]
    masks = [
        golden.inputs.get(f"attention_mask_{name}", np.ones_like(part)) for name, part in zip(names, ids, strict=True)
    ]
    return [np.concatenate(parts) for parts in (ids, decoder_ids, masks)]


def assert_t5_logits(golden: Golden, dtype: str) -> None:
    """Whole and padded rows in one batch, and shorter ones."""
    model = t5(golden, dtype)
    encoded, logits = read_and_write(model, *t5_inputs(golden, "a", "pad"))
    rows = len(golden.inputs["ids_a"])
    assert_close(logits[:rows], golden.outputs["logits_a"], dtype)
    assert_close(logits[rows:], golden.outputs["logits_pad"], dtype)
    assert_close(encoded[rows:], golden.outputs["encoder_hidden_pad"], dtype)
    _, logits = read_and_write(model, *t5_inputs(golden, "b"))
    assert_close(logits, golden.outputs["logits_b"], dtype)


@pytest.mark.always("t5-augmented-encoder", "t5-softmax")
@pytest.mark.family("t5")
def test_t5_logits(golden: Golden) -> None:
    assert_t5_logits(golden, "float64")


@pytest.mark.always("t5-augmented")
@pytest.mark.holds("weights/.*dwconv")
@pytest.mark.family("t5")
def test_t5_logits_in_single_precision(golden: Golden) -> None:
    assert_t5_logits(golden, "float32")


@pytest.mark.always("t5-augmented")
@pytest.mark.family("t5")
def test_t5_classification(golden: Golden) -> None:
    ids, _, mask = t5_inputs(golden, "a", "pad")
    logits = classify(t5_classifier(golden, "float64"), ids, mask)
    expected = [golden.outputs[f"classification_logits_{name}"] for name in ("a", "pad")]
    assert_close(logits, np.concatenate(expected), "float64")


@jax.jit
@nnx.value_and_grad
def t5_loss(model: T5, ids: jax.Array, decoder_ids: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(ids, decoder_ids), labels).mean()


@pytest.mark.thorough
@pytest.mark.holds("grads/")
@pytest.mark.family("t5")
def test_t5_loss_and_gradients(golden: Golden) -> None:
    """All taps of the encoder's convolution have a gradient to compare, of the decoder's those that are not masked."""
    model = t5(golden, "float64")
    ids, decoder_ids, _ = t5_inputs(golden, "a")
    loss, gradients = t5_loss(model, ids, decoder_ids, golden.inputs["labels_a"])
    assert_close(loss, golden.outputs["loss_a"], "float64")
    found = named(gradients, t5_entries(model))
    assert set(found) == set(golden.grads)
    assert not set(found) & set(golden.config["unused_parameters"])
    for name, expected in golden.grads.items():
        masked = name.startswith("decoder") and name.endswith("dwconv.weight")
        kept = np.s_[:, :, : expected.shape[2] // 2 + 1] if masked else np.s_[:]
        assert_close(found[name][kept], expected[kept], "float64")
