"""The objective of path heads against a double loop over positions and depths."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.errors import UserError
from lin_jax.evaluation import head_accuracy
from lin_jax.losses.cross_entropy import path_ahead
from lin_jax.models import Llama, LlamaConfig, PathHead
from lin_jax.models.params import params_of
from lin_jax.training import RunConfig
from lin_jax.training.objective_configs import HeadsConfig
from lin_jax.training.objectives import PathHeadObjective
from lin_jax.training.objectives.draft_vocabulary import (
    count_tokens,
    frequent_tokens,
    tokens_as_text,
    tokens_from_text,
)
from lin_jax.training.objectives.registry import check_run, heads_layers

CONFIG = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_layers=1, num_heads=2)
DEPTH, DECAY = 3, 0.7
DOCUMENTS = np.array([[1, 1, 1, 1, 2, 2, 3, 3, 3], [1, 1, 1, 1, 1, 1, 0, 0, 0]], np.int32)
TOKENS = np.random.default_rng(0).integers(0, 11, DOCUMENTS.shape).astype(np.int32)
BATCH = {"tokens": TOKENS, "segment_ids": DOCUMENTS}


@pytest.fixture(scope="module")
def exact():
    """The objective, a model and a head in float64."""
    with jax.enable_x64(True):
        config = replace(CONFIG, dtype="float64", param_dtype="float64", initializer_range=0.3)
        model = Llama(config, rngs=nnx.Rngs(0))
        head = PathHead.on(model, 5, nnx.Rngs(1))
        head.outer[...] = 0.5 * jax.random.normal(jax.random.key(2), head.outer.shape)
        yield PathHeadObjective(config, 5, DEPTH, DECAY), model, head


def slow_guesses(model, head):
    """`(row, position, depth) -> logits [V]`, for all targets in the document of their position, one by one."""
    hidden = model.hidden(TOKENS[:, :-1], DOCUMENTS[:, :-1])
    step, logits = jax.jit(PathHead.step), jax.jit(PathHead.logits)
    guesses = {}
    for row, position in np.ndindex(2, 8):
        state = head.begin(hidden[row, position])
        for depth in range(DEPTH):
            target = position + depth + 2
            if target > 8 or DOCUMENTS[row, target] != DOCUMENTS[row, position] or not DOCUMENTS[row, position]:
                break
            state = step(head, state, TOKENS[row, position + depth + 1])
            guesses[row, position, depth] = np.asarray(logits(head, state))
    return guesses


def test_the_loss_is_that_of_a_double_loop(exact):
    objective, model, head = exact
    losses = [[] for _ in range(DEPTH)]
    for (row, position, depth), logits in slow_guesses(model, head).items():
        losses[depth].append(np.log(np.exp(logits).sum()) - logits[TOKENS[row, position + depth + 2]])
    sums = jax.jit(objective.sums)(params_of(head), params_of(model), BATCH)
    assert list(sums.tokens) == list(objective.counts(BATCH)) == [len(each) for each in losses]
    np.testing.assert_allclose(sums.loss, [sum(each) for each in losses], rtol=1e-10)
    np.testing.assert_allclose(objective.coefficients, [1, DECAY, DECAY**2])


def test_the_model_teaches_what_it_would_say(exact):
    """Cross entropy against the model's distribution of the very token that is to be guessed."""
    _, model, head = exact
    taught = PathHeadObjective(model.config, 5, DEPTH, DECAY, "model")
    teacher = jax.nn.softmax(model(TOKENS[:, :-1], segment_ids=DOCUMENTS[:, :-1]))
    losses, hits = [[] for _ in range(DEPTH)], np.zeros(DEPTH, int)
    for (row, position, depth), logits in slow_guesses(model, head).items():
        shown = np.asarray(teacher[row, position + depth + 1])
        losses[depth].append(np.log(np.exp(logits).sum()) - shown @ logits)
        hits[depth] += logits.argmax() == shown.argmax()
    sums = jax.jit(taught.sums)(params_of(head), params_of(model), BATCH)
    assert list(sums.tokens) == list(taught.counts(BATCH)) == [len(each) for each in losses]
    assert list(sums.correct) == hits.tolist()
    np.testing.assert_allclose(sums.loss, [sum(each) for each in losses], rtol=1e-10)


def test_ranks_along_the_true_path(exact):
    _, model, head = exact
    hits = np.zeros((DEPTH, 4))
    counts = np.zeros(DEPTH)
    for (row, position, depth), logits in slow_guesses(model, head).items():
        rank = list(np.argsort(-logits, kind="stable")).index(TOKENS[row, position + depth + 2])
        counts[depth] += 1
        hits[depth, rank : rank + 1] += 1
    accuracy = head_accuracy(model, head, [BATCH], depth=DEPTH, ranks=4)
    np.testing.assert_array_equal(accuracy.counts, counts)
    np.testing.assert_allclose(accuracy.table, hits / counts[:, None])


def test_packed_documents_never_leak(exact):
    """A document in the middle of a row has the gradient that it has alone, whatever its neighbours are."""
    objective, model, head = exact

    @jax.jit
    def gradient(batch):
        return jax.grad(lambda params: objective.sums(params, params_of(model), batch).loss.sum())(params_of(head))

    middle = np.array([[1, 2, 2, 2, 2, 2, 3, 3, 3]])
    others = np.where(middle == 2, TOKENS[:1], (TOKENS[:1] + 1) % 11)
    rows = [{"tokens": tokens, "segment_ids": np.where(middle == 2, 2, 0)} for tokens in (TOKENS[:1], others)]
    first, second = (gradient(row) for row in rows)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    # What the whole row adds up to is what its documents, each alone, add up to.
    alone = [gradient({"tokens": TOKENS[:1], "segment_ids": np.where(middle == d, d, 0)}) for d in (1, 2, 3)]
    whole = gradient({"tokens": TOKENS[:1], "segment_ids": middle})
    jax.tree.map(
        lambda sums, *each: np.testing.assert_allclose(sums, sum(map(np.asarray, each)), rtol=1e-9, atol=1e-12),
        whole,
        *alone,
    )


def test_the_base_gets_no_gradient(exact):
    objective, model, head = exact
    loss = jax.jit(jax.grad(lambda frozen: objective.sums(params_of(head), frozen, BATCH).loss.sum()))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(loss(params_of(model))))


def test_paths_are_of_one_document():
    """Wherever there is a token to guess, all tokens before it on the path are of the same document."""
    path, (ids, included) = path_ahead(BATCH, DEPTH)
    assert path.shape == ids.shape == (2, 8, DEPTH)
    for row, position, depth in np.argwhere(included):
        ahead = slice(position, position + depth + 3)
        assert len(set(DOCUMENTS[row, ahead])) == 1
        np.testing.assert_array_equal(path[row, position, : depth + 1], TOKENS[row, ahead][1:-1])
        assert ids[row, position, depth] == TOKENS[row, ahead][-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "objective 'path' needs init_from"),
        ({"init_from": "x", "targets": "nobody"}, "heads.targets is 'nobody'; choose one of text, model"),
        ({"init_from": "x", "depth": 0}, "heads.depth is 0; give 1 or more"),
        ({"init_from": "x", "depth": 256}, "sequence_length 256 leaves nothing to predict at the end of heads.depth"),
    ],
)
def test_contradicting_options(options, message):
    def check(init_from=None, **heads):
        check_run(RunConfig(output="x", objective="path", init_from=init_from, heads=HeadsConfig(**heads)))

    with pytest.raises(UserError, match=message):
        check(**options)


def test_a_path_head_learns_what_follows(exact):
    """On texts that count upwards, the tokens of the path say what comes, whatever the model makes of them."""
    import optax

    objective, model, _ = exact
    with jax.enable_x64(True):
        params = objective.start(jax.random.key(0), model)
        starts = np.random.default_rng(1).integers(0, 11, (8, 1))
        batch = {"tokens": (starts + np.arange(9)) % 11, "segment_ids": np.ones((8, 9), np.int32)}
        adam = optax.adam(0.03)
        moments = adam.init(params)

        @jax.jit
        def step(params, moments):
            def loss(params):
                sums = objective.sums(params, params_of(model), batch)
                return jnp.mean(sums.loss / sums.tokens), sums

            gradient, sums = jax.grad(loss, has_aux=True)(params)
            updates, moments = adam.update(gradient, moments)
            return optax.apply_updates(params, updates), moments, sums

        for _ in range(60):
            params, moments, sums = step(params, moments)
    assert all(accuracy > 0.9 for accuracy in objective.figures(sums).values())
    assert list(objective.figures(sums)) == [f"accuracy_depth_{depth}" for depth in range(DEPTH)]


@pytest.mark.parametrize("targets", ["text", "model"])
def test_own_drafts_and_a_trimmed_vocabulary(exact, targets):
    """Against a loop: a depth counts where the guesses before were the text's, and its own token can be guessed."""
    _, model, head = exact
    tokens = tuple(range(0, 11, 2))
    few = PathHead.on(model, 5, nnx.Rngs(1), tokens=tokens)
    few.outer[...] = head.outer[...]
    texts = np.array([6, 6, 2, 5], np.int32)[np.random.default_rng(1).integers(0, 4, (24, 9))]
    batch = {"tokens": texts}
    hidden, path = model.hidden(texts[:, :-1]), path_ahead(batch, DEPTH)[0]
    teacher, found = np.asarray(jax.nn.softmax(model.logits(hidden))), np.asarray(few.unrolled(hidden, path))
    guesses = {place: found[place] for place in np.ndindex(24, 8, DEPTH) if sum(place[1:]) + 2 <= 8}
    losses, counted, every, hits = (np.zeros(DEPTH) for _ in range(4))
    for (row, position, depth), logits in guesses.items():
        reached = all(
            tokens[guesses[row, position, before].argmax()] == texts[row, position + before + 2]
            for before in range(min(depth, 1))
        )
        if targets == "text":
            target, shown = texts[row, position + depth + 2], np.eye(11)[texts[row, position + depth + 2]]
        else:
            shown = teacher[row, position + depth + 1]
            target = shown.argmax()
        every[depth] += 1
        if not reached or target not in tokens:
            continue
        kept = shown[list(tokens)]
        losses[depth] += np.log(np.exp(logits).sum()) - (kept / kept.sum()) @ logits
        counted[depth] += 1
        hits[depth] += tokens[logits.argmax()] == target
    assert 0 < counted[1] < every[1]
    assert counted[0] < every[0]
    objective = PathHeadObjective(model.config, 5, DEPTH, DECAY, targets, tokens=tokens, self_steps=1)
    params = params_of(few)
    del params["tokens"]
    assert jax.tree.map(jnp.shape, objective.start(jax.random.key(0), model)) == jax.tree.map(jnp.shape, params)
    sums = objective.training_sums(params, params_of(model), batch, jax.random.key(0))
    np.testing.assert_allclose(sums.loss, losses, rtol=1e-9)
    assert list(sums.correct) == hits.tolist()
    assert list(sums.tokens) == every.tolist() == list(objective.counts(batch))
    whole = objective.sums(params, params_of(model), batch)
    assert all(whole.loss[1:] > sums.loss[1:])
    accuracy = head_accuracy(model, objective.parts(params, {})[1], [batch], depth=DEPTH, ranks=11)
    assert accuracy.table.sum(axis=1).max() <= 1


def test_frequent_tokens_as_text():
    counts = count_tokens(iter([{"tokens": np.array([[5, 5, 5, 1, 2, 2, 0, 9]])}]), 12)
    assert frequent_tokens(counts, 3) == (0, 2, 5)
    assert frequent_tokens(counts, 12) == tuple(range(12))
    for tokens, text in (((0, 2, 5), "0,2,5"), ((0, 1, 2, 7, 9, 10), "0-2,7,9-10"), ((4,), "4")):
        assert tokens_as_text(tokens) == text
        assert tokens_from_text(text, 11) == tokens
    for text in ("", "3-1", "5,4", "1,1", "0-11", "x", "-2"):
        with pytest.raises(UserError, match="are no ascending ranges of the 11 tokens"):
            tokens_from_text(text, 11)
    with pytest.raises(UserError, match=r"heads\.vocabulary is 13, and the model has 12 tokens"):
        frequent_tokens(counts, 13)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (1, 0)}, r"heads.layers is \[1, 0\]; give numbers from 0 to 3, in ascending order"),
        ({"layers": (4,)}, "heads.layers is .4.; give numbers from 0 to 3"),
        ({"self_steps": -1}, "heads.self_steps is -1; give 0 or more"),
        ({"vocabulary": 0}, "heads.vocabulary is 0; give 1 or more tokens"),
        ({"objective": "medusa", "layers": (1,)}, r"heads.layers \[1\] is for objective path, not 'medusa'"),
        ({"objective": "medusa", "vocabulary": 9}, "heads.vocabulary 9 is for objective path, not 'medusa'"),
    ],
)
def test_options_of_path_heads(options, message):
    def check(objective="path", **heads):
        model = replace(CONFIG, num_layers=4)
        run = RunConfig(output="x", objective=objective, init_from="x", model=model, heads=HeadsConfig(**heads))
        check_run(run)
        heads_layers(run)

    with pytest.raises(UserError, match=message):
        check(**options)


@pytest.mark.parametrize(("layers", "expected"), [(1, ()), (2, (0,)), (4, (1, 2)), (16, (4, 8, 12))])
def test_layers_that_are_read_by_default(layers, expected):
    run = RunConfig(output="x", objective="path", init_from="x", model=replace(CONFIG, num_layers=layers))
    assert heads_layers(run) == expected
