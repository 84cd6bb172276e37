"""Attention transfer against a loop over layers, documents, heads and tokens in NumPy; what learns, and from what."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from support.cells import some_of

from lin_jax.attention import AttentionConfig, registry
from lin_jax.attention.composition import ComposedAttention
from lin_jax.errors import UserError
from lin_jax.models import FlashConfig, Gpt2Config, Llama, LlamaConfig
from lin_jax.models.adapters import TrainableFilter
from lin_jax.models.params import params_of
from lin_jax.training import RunConfig
from lin_jax.training.objective_configs import TransferConfig
from lin_jax.training.objectives import AttentionTransfer, PartialTraining, next_token
from lin_jax.training.objectives.registry import check_run, objective_of
from lin_jax.training.train_step import accumulate_gradients

GROUP = 3
CONFIG = LlamaConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    initializer_range=0.4,
    attention=AttentionConfig(group_size=GROUP, kernel_size=5, initial_alpha=0.3),
    dtype="float64",
    param_dtype="float64",
)
DOCUMENTS = np.array([[1, 1, 1, 1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 2, 0, 0, 0, 0]], np.int32)
TOKENS = np.random.default_rng(0).integers(0, 11, DOCUMENTS.shape).astype(np.int32)
BATCH = {"tokens": TOKENS, "segment_ids": DOCUMENTS}


@pytest.fixture(scope="module")
def models():
    """A student with taps and alphas of its own, and its teacher; their norms and embeddings are the same."""
    with jax.enable_x64(True):
        student = Llama(CONFIG, rngs=nnx.Rngs(0))
        teacher = Llama(replace(CONFIG, attention=AttentionConfig("softmax")), rngs=nnx.Rngs(1))
        for part in ("embed", "norm"):
            setattr(student, part, getattr(teacher, part))
        mixer = student.layers.layers.attention.mixer
        taps = mixer.convolution.taps
        taps[...] = jnp.asarray(np.random.default_rng(1).normal(0, 0.3, taps.shape))
        yield student, teacher


def rms_norm(x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + CONFIG.norm_eps)


def rotated(x):
    """Heads `[T, H, D]` of one document, turned by their positions."""
    half = x.shape[-1] // 2
    turns = np.exp(1j * np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(half) / half))
    turned = (x[..., :half] + 1j * x[..., half:]) * turns[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def unit(x):
    return x / np.linalg.norm(x)


def mixed(layer, q, k, v, softmax):
    """Outputs `[T, H, D]` of one document."""
    out = np.zeros_like(q)
    for t, head in np.ndindex(*q.shape[:2]):
        shared = head // 2
        if softmax:
            weights = np.exp([q[t, head] @ k[s, shared] / q.shape[-1] ** 0.5 for s in range(t + 1)])
            out[t, head] = weights / weights.sum() @ v[: t + 1, shared]
            continue
        mixer = layer["mixer"]
        for s in range(t + 1):
            cosine = unit(q[t, head]) @ unit(k[s, shared])
            weight = max(cosine, 0) ** 2 if s // GROUP == t // GROUP else mixer["alpha"][0] * cosine
            out[t, head] += weight * v[s, shared]
            if t - s < 3:
                out[t, head] += mixer["convolution"]["taps"][head, t - s] * v[s, shared]
    return out


def attended(attention, x, softmax):
    """What attention adds to the residual stream of one document `[T, E]`."""
    y = rms_norm(x)
    q, k, v = ((y @ attention[name]["kernel"]).reshape(len(y), -1, 2) for name in ("query", "key", "value"))
    out = mixed(attention, rotated(q), rotated(k), v, softmax)
    return out.reshape(len(y), -1) @ attention["out"]["kernel"]


def finished(layer, x, added):
    x = x + added
    y, part = rms_norm(x), layer["feed_forward"]
    gate = y @ part["gate"]["kernel"]
    return x + (gate / (1 + np.exp(-gate)) * (y @ part["up"]["kernel"])) @ part["down"]["kernel"]


def slow_sums(student, teacher, first, end, progressive):
    """Errors and squares `[2 L]`, a document at a time."""
    own, theirs = (jax.tree.map(np.asarray, params_of(model)) for model in (student, teacher))
    layers = [
        [jax.tree.map(lambda part, at=at: part[at], each["layers"]["layers"]) for at in range(3)]
        for each in (own, theirs)
    ]
    errors, squares = np.zeros(end - first), np.zeros(end - first)
    for row, document in ((0, 1), (0, 2), (1, 1), (1, 2)):
        x = theirs["embed"]["embedding"][TOKENS[row, :-1][DOCUMENTS[row, :-1] == document]]
        for number in range(end):
            mine, taught = (each[number] for each in layers)
            if number < first and progressive:
                x = finished(mine, x, attended(mine["attention"], x, softmax=False))
                continue
            expected = attended(taught["attention"], x, softmax=True)
            if number >= first:
                found = attended(mine["attention"], x, softmax=False)
                errors[number - first] += np.sum((found - expected) ** 2) / 8
                squares[number - first] += np.sum(expected**2) / 8
            x = finished(taught, x, expected)
    return np.concatenate([errors, squares])


@pytest.mark.parametrize(("layers", "progressive"), some_of([((1, 3), False), ((0, 3), False), ((1, 2), True)], 1))
def test_the_loss_is_that_of_a_loop(models, layers, progressive, x64):
    student, teacher = models
    objective = AttentionTransfer(CONFIG, layers=layers, progressive=progressive)
    sums = jax.jit(objective.sums)(params_of(student), {"teacher": teacher}, BATCH)
    np.testing.assert_allclose(sums.loss, slow_sums(student, teacher, *layers, progressive), rtol=1e-10)
    count = layers[1] - layers[0]
    assert list(sums.tokens) == list(objective.counts(BATCH)) == [8 + 5] * 2 * count
    assert objective.coefficients == (1.0,) * count + (0.0,) * count
    figures = objective.figures(jax.device_get(sums))
    assert figures[f"missed_layer_{layers[0]}"] == pytest.approx(float(sums.loss[0] / sums.loss[count]))


@pytest.mark.thorough
def test_only_what_is_named_learns(models, x64):
    """Gradients of attention's parts in the layers that learn, and of nothing else, exactly zero."""
    student, teacher = models
    objective = AttentionTransfer(CONFIG, layers=(1, 2), progressive=True)

    @jax.jit
    def slopes(params):
        return jax.grad(lambda params: objective.sums(params, {"teacher": teacher}, BATCH).loss[0])(params)

    every = flatten_dict(slopes(params_of(student)))
    for path, slope in every.items():
        inside = "attention" in path or "attention_norm" in path
        assert inside or not np.any(slope), path
        if inside:
            assert np.any(slope[1]), path
            assert not np.any(slope[0]), path
            assert not np.any(slope[2]), path
    partly = PartialTraining(objective, TrainableFilter(("mixer", "projections"), "attention", (1, 2)), 0)
    learnt = flatten_dict(partly.start(jax.random.key(0), student))
    assert {path[3] for path in learnt} == {"query", "key", "value", "out", "mixer"}
    assert all(len(value) == (3 if "mixer" in path else 1) for path, value in learnt.items())
    frozen = {**partly.frozen(student), "teacher": teacher}
    parts = jax.jit(jax.grad(lambda params: partly.sums(params, frozen, BATCH).loss[0]))(
        partly.start(jax.random.key(0), student)
    )
    for path, slope in flatten_dict(parts).items():
        expected = every[path] if "mixer" in path else every[path][1:2]
        np.testing.assert_allclose(slope, expected, rtol=1e-9, atol=1e-14)


def test_mixers_of_a_mix_learn():
    """They stand beside the layers, kind by kind, and learn as those inside of a layer's attention do."""
    mix = AttentionConfig("clustered+window", window=4, features=3, layers={1: "softmax"})
    config = replace(CONFIG, attention=mix, dtype="float32", param_dtype="float32")
    learning = TrainableFilter(("mixer", "projections"), "attention")
    learnt = PartialTraining(AttentionTransfer(config), learning, 0).shapes()
    names = {path[-1] for path in flatten_dict(learnt) if "mixer" in path}
    assert {"balance", "key_map", "query_map"} <= names
    assert all("mixer" in path or "attention" in path for path in flatten_dict(learnt))


def test_a_student_that_is_the_teacher_misses_nothing(models, x64):
    _, teacher = models
    objective = AttentionTransfer(teacher.config)
    sums = jax.jit(objective.sums)(params_of(teacher), {"teacher": teacher}, BATCH)
    assert not np.any(sums.loss[:3])
    assert objective.figures(jax.device_get(sums))["missed"] == 0


class WindowBesideMemory(ComposedAttention):
    """A stand-in for an attention whose window can be narrowed: groups of other sizes, over the same parameters."""

    def narrowed(self, tokens):
        mixer = nnx.merge(*nnx.split(self))
        mixer.group_size = tokens
        return mixer


@pytest.fixture
def windowed(monkeypatch):
    """Lets every attention be one whose window can be narrowed."""
    monkeypatch.setattr(registry, "ComposedAttention", WindowBesideMemory)


def test_windows_are_narrowed_as_the_key_draws(models, windowed, x64):
    """In training each layer has its whole window or the narrow one, as drawn for it; in validation, the whole one."""
    student, teacher = models
    params, frozen = params_of(student), {"teacher": teacher}
    objective = AttentionTransfer(CONFIG, window_dropout=0.5, narrowed_window=2)
    whole = jax.jit(objective.sums)(params, frozen, BATCH).loss
    np.testing.assert_allclose(whole, AttentionTransfer(CONFIG).sums(params, frozen, BATCH).loss, rtol=1e-12)
    narrow_config = replace(CONFIG, attention=replace(CONFIG.attention, group_size=2))
    narrow = jax.jit(AttentionTransfer(narrow_config).sums)(params, frozen, BATCH).loss
    assert not np.any(np.isclose(narrow[:3], whole[:3]))
    drawn = set()
    in_training = jax.jit(objective.training_sums)
    for number in range(6):
        found = in_training(params, frozen, BATCH, jax.random.key(number)).loss
        layers = np.isclose(found[:3], narrow[:3], rtol=1e-10)
        np.testing.assert_allclose(found[:3], np.where(layers, narrow[:3], whole[:3]), rtol=1e-10)
        np.testing.assert_allclose(found[3:], whole[3:], rtol=1e-12)
        drawn.add(tuple(layers.tolist()))
    assert len(drawn) > 2


@pytest.mark.thorough
def test_a_step_hands_the_key_through_to_what_learns(models, windowed, x64):
    """With p = 1, loss and gradient of microbatches are those of a model whose windows are narrow."""
    student, teacher = models
    always = AttentionTransfer(CONFIG, window_dropout=1.0, narrowed_window=2)
    partly = PartialTraining(always, TrainableFilter(("mixer", "projections"), "attention"), 0)
    narrow_config = replace(CONFIG, attention=replace(CONFIG.attention, group_size=2))
    narrow = PartialTraining(
        AttentionTransfer(narrow_config), TrainableFilter(("mixer", "projections"), "attention"), 0
    )
    params = partly.start(jax.random.key(0), student)
    frozen = {**partly.frozen(student), "teacher": teacher}
    slopes = jax.jit(accumulate_gradients, static_argnums=(0, 1))
    found = slopes(partly, 2, params, frozen, BATCH, jax.random.key(3))
    expected = slopes(narrow, 2, params, frozen, BATCH)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-14), found, expected)


def test_window_dropout_needs_a_window():
    with pytest.raises(UserError, match=r"transfer.window_dropout 0.5 is for attention with a softmax window"):
        AttentionTransfer(CONFIG, window_dropout=0.5)


@pytest.mark.parametrize("name", ["softmax", "clustered+window"])
def test_rows_begin_anywhere_in_the_context(name, x64):
    """A softmax teacher, and a window alone, say the same wherever a row begins; a memory of turned keys does not."""
    teacher = Llama(replace(CONFIG, attention=AttentionConfig("softmax")), rngs=nnx.Rngs(1))
    config = replace(CONFIG, attention=AttentionConfig(name, window=2, features=4))
    params, frozen = params_of(Llama(config, rngs=nnx.Rngs(2))), {"teacher": teacher}
    long = AttentionTransfer(config, context_length=64)
    at_zero = np.asarray(jax.jit(long.sums)(params, frozen, BATCH).loss)
    in_training = jax.jit(long.training_sums)
    one, other = (np.asarray(in_training(params, frozen, BATCH, jax.random.key(number)).loss) for number in (0, 1))
    for each in (one, other):
        np.testing.assert_allclose(each[3:], at_zero[3:], rtol=1e-9)
        assert np.allclose(each[:3], at_zero[:3], rtol=1e-9) == (name == "softmax")
    assert np.allclose(one, other, rtol=1e-9) == (name == "softmax")


def test_rows_as_long_as_the_context_begin_at_zero(models, x64):
    student, teacher = models
    short = AttentionTransfer(CONFIG, context_length=8)
    given = params_of(student), {"teacher": teacher}, BATCH
    drawn = jax.jit(short.training_sums)(*given, jax.random.key(0))
    np.testing.assert_allclose(drawn.loss, jax.jit(short.sums)(*given).loss, rtol=1e-12)


def test_a_context_is_for_rotary_positions():
    config = Gpt2Config(vocab_size=11, hidden_size=8, num_layers=1, num_heads=2, max_positions=16)
    with pytest.raises(UserError, match=r"transfer.context_length 64 is for models with rotary positions, and a Gpt2"):
        AttentionTransfer(config, context_length=64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transfer": {"context_length": 0}}, "transfer.context_length is 0; give 1 or more tokens, or null"),
        ({"transfer": {"window_dropout": 1.5}}, "transfer.window_dropout is 1.5; give a probability between 0 and 1"),
        ({"transfer": {"narrowed_window": 0}}, "transfer.narrowed_window is 0; give 1 or more tokens"),
        ({"init_from": None}, "objective 'attention_transfer' needs init_from"),
        ({"transfer": {"learns": ("everything",)}}, "transfer.learns names 'everything'; choose among mixer, "),
        ({"transfer": {"layers": (2, 1)}}, r"transfer.layers is \[2, 1\]; give the first layer and the one after"),
        ({"transfer": {"blocks": 0}}, "transfer.blocks is 0; give 1 or more"),
        ({"transfer": {"blocks": 2, "layers": (0, 1)}}, "transfer.blocks 2 and transfer.layers exclude each other"),
    ],
)
def test_contradicting_options(options, message):
    given = {"init_from": "x", **options}

    def make():
        transfer = TransferConfig(**given.pop("transfer", {}))
        check_run(RunConfig(output="x", objective="attention_transfer", transfer=transfer, **given))

    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("transfer", "message"),
    [
        ({"layers": (1, 4)}, "transfer.layers ends at 4, and the model has 3 layers"),
        ({"blocks": 4}, "transfer.blocks is 4, and the model has 3 layers"),
        ({"blocks": 3}, "takes a run for each block; make this a stage"),
    ],
)
def test_layers_that_there_are_not(transfer, message):
    run = RunConfig(
        output="x",
        objective="attention_transfer",
        init_from="x",
        model=replace(CONFIG, dtype="float32", param_dtype="float32"),
        transfer=TransferConfig(**transfer),
    )
    with pytest.raises(UserError, match=message):
        objective_of(run)


def test_layers_without_an_attention_of_their_own_are_refused():
    with pytest.raises(UserError, match="is for LLaMA and GPT-2, and the model is a Flash"):
        AttentionTransfer(FlashConfig(vocab_size=11, hidden_size=8, num_layers=1))


def test_nothing_is_drawn_for_frozen_parameters_that_the_base_has(models, monkeypatch):
    """Mixers that learn are no part of what is frozen: it is the base's own, without a draw of what it lacks."""
    _, teacher = models
    objective = PartialTraining(AttentionTransfer(CONFIG), TrainableFilter(("mixer",), "attention"), 0)
    drawn = []
    monkeypatch.setattr(next_token, "new_params", lambda *given: drawn.append(given))
    frozen = flatten_dict(objective.frozen(teacher)["rest"])
    base = flatten_dict(params_of(teacher))
    assert not drawn
    assert {path for path in base if "mixer" not in path} == set(frozen)
    assert all(frozen[path] is base[path] for path in frozen)
