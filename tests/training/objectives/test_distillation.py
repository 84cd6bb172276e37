"""Distillation against its formula, written out."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from scipy.special import log_softmax

from lin_jax.attention import AttentionConfig
from lin_jax.errors import UserError
from lin_jax.models import Llama, LlamaConfig
from lin_jax.models.adapters import AdapterConfig
from lin_jax.models.params import params_of
from lin_jax.training import RunConfig
from lin_jax.training.objective_configs import DistillationConfig
from lin_jax.training.objectives import Distillation, PartialTraining, distillation
from lin_jax.training.objectives.registry import check_run, keeps_base, objective_of

CONFIG = LlamaConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_layers=1,
    num_heads=2,
    initializer_range=0.4,
    attention=AttentionConfig(group_size=4, kernel_size=3),
    dtype="float64",
    param_dtype="float64",
)
DOCUMENTS = np.array([[1, 1, 1, 1, 2, 2, 3, 3, 3], [1, 1, 1, 1, 1, 1, 0, 0, 0]], np.int32)
TOKENS = np.random.default_rng(0).integers(0, 11, DOCUMENTS.shape).astype(np.int32)
BATCH = {"tokens": TOKENS, "segment_ids": DOCUMENTS}
WEIGHT, TEMPERATURE, TEXT_WEIGHT = 0.7, 2.5, 0.3


@pytest.fixture(scope="module")
def models():
    with jax.enable_x64(True):
        student = Llama(CONFIG, rngs=nnx.Rngs(0))
        # A teacher may be of another size and kind.
        sizes = {"hidden_size": 12, "num_layers": 2, "attention": AttentionConfig("softmax")}
        yield student, Llama(replace(CONFIG, **sizes), rngs=nnx.Rngs(1))


@pytest.mark.parametrize("logits", [2**25, 40], ids=["whole", "in pieces"])
def test_the_loss_is_the_formula(models, logits, x64, monkeypatch):
    monkeypatch.setattr(distillation, "LOGITS", logits)
    student, teacher = models
    objective = Distillation(CONFIG, None, DistillationConfig(WEIGHT, TEMPERATURE, TEXT_WEIGHT))
    own, theirs = (np.asarray(model(TOKENS[:, :-1], DOCUMENTS[:, :-1])) for model in models)
    entropy = divergence = tokens = right = 0
    for row, t in np.ndindex(2, 8):
        if DOCUMENTS[row, t] != DOCUMENTS[row, t + 1] or not DOCUMENTS[row, t]:
            continue
        entropy -= log_softmax(own[row, t])[TOKENS[row, t + 1]]
        p, q = (log_softmax(each[row, t] / TEMPERATURE) for each in (theirs, own))
        divergence += np.sum(np.exp(p) * (p - q))
        right += own[row, t].argmax() == theirs[row, t].argmax()
        tokens += 1
    sums = jax.jit(objective.sums)(params_of(student), {"teacher": teacher}, BATCH)
    np.testing.assert_allclose(sums.loss, [entropy, divergence], rtol=1e-10)
    assert list(sums.tokens) == list(objective.counts(BATCH)) == [tokens, tokens]
    assert int(sums.correct[1]) == right
    assert objective.coefficients == (TEXT_WEIGHT, WEIGHT * TEMPERATURE**2)
    figures = objective.figures(jax.device_get(sums))
    assert figures["perplexity"] == pytest.approx(np.exp(entropy / tokens))
    assert figures["teacher_divergence"] == pytest.approx(divergence / tokens)
    assert figures["teacher_agreement"] == pytest.approx(right / tokens)


@pytest.mark.thorough
def test_gradients_are_the_same_in_pieces(models, x64, monkeypatch):
    student, teacher = models
    objective = Distillation(CONFIG, None, DistillationConfig(WEIGHT, TEMPERATURE))

    def slopes(logits):
        monkeypatch.setattr(distillation, "LOGITS", logits)
        loss = lambda params: objective.sums(params, {"teacher": teacher}, BATCH).loss.sum()  # noqa: E731
        return jax.jit(jax.grad(loss))(params_of(student))

    whole, pieces = slopes(2**25), slopes(40)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12), whole, pieces)


def test_only_the_parts_that_it_names_learn(models, x64):
    student, teacher = models
    run = RunConfig(
        output="x",
        init_from="y",
        model=CONFIG,
        distillation=DistillationConfig(1.0, text_weight=0.0, learns=("mixer",)),
    )
    objective = objective_of(run)
    assert isinstance(objective, PartialTraining)
    params, frozen = objective.start(jax.random.key(0), student), objective.frozen(student)
    paths = flatten_dict(params)
    assert paths
    assert all("mixer" in path for path in paths)
    whole = Distillation(CONFIG, None, DistillationConfig(1.0, text_weight=0.0))
    expected = jax.jit(whole.sums)(params_of(student), {"teacher": teacher}, BATCH)
    found = jax.jit(objective.sums)(params, {**frozen, "teacher": teacher}, BATCH)
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-12)
    assert keeps_base(run)


@pytest.mark.parametrize(
    ("distillation", "options", "message"),
    [
        ({"weight": -1.0}, {}, "distillation.weight is -1.0; give 0 or more"),
        ({"weight": 1.0, "temperature": 0.0}, {}, "distillation.temperature is 0.0; give a positive"),
        ({"weight": 1.0, "text_weight": -1.0}, {}, "distillation.text_weight is -1.0; give 0 or more"),
        ({"text_weight": 0.0}, {}, "distillation.text_weight is 0.0 and there is no teacher; give distillation.weight"),
        ({"weight": 1.0}, {}, "distillation.weight 1.0 needs a teacher"),
        ({"weight": 1.0, "learns": ()}, {}, "distillation.learns is empty; name some of embeddings"),
        ({"weight": 1.0, "learns": ("tail",)}, {}, "distillation.learns names 'tail'; choose among embeddings"),
        ({"learns": ("mixer",)}, {}, r"distillation.learns is \['mixer'\] and there is no teacher; give"),
        ({"weight": 1.0, "learns": ("mixer",)}, {"teacher": "x"}, "leaves parts of the model as they are; give init_"),
        (
            {"weight": 1.0, "learns": ("mixer",)},
            {"init_from": "x", "adapters": AdapterConfig()},
            "is for runs without adapters, which say what learns beside them",
        ),
        ({"weight": 1.0}, {"objective": "medusa", "init_from": "x"}, "is for objective language_model, not 'medusa'"),
        ({}, {"teacher": "x"}, "teacher x has nothing to teach"),
    ],
)
def test_contradicting_options(distillation, options, message):
    def make():
        check_run(RunConfig(output="x", distillation=DistillationConfig(**distillation), **options))

    with pytest.raises(UserError, match=message):
        make()
