"""Divergences with a teacher's attention in one layer, against models that are built so."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from support.model_forms import forward, random_model

from lin_jax.attention import AttentionConfig
from lin_jax.evaluation.layer_selection import NONE, LayerDivergences, measure_layers
from lin_jax.models import Llama, LlamaConfig
from lin_jax.models.params import filled, initial_params, mixer_order, params_of

LAYERS = 3
CONFIG = LlamaConfig(
    vocab_size=19,
    hidden_size=16,
    intermediate_size=24,
    num_layers=LAYERS,
    num_heads=2,
    attention=AttentionConfig("softmax"),
    dtype="float64",
    param_dtype="float64",
)
AUGMENTED = AttentionConfig("augmented", group_size=4, kernel_size=5)


def with_attention(model: Llama, attention: AttentionConfig) -> Llama:
    own = random_model(lambda rngs: Llama(replace(CONFIG, attention=attention), rngs=rngs), seed=7)
    orders = mixer_order(own.config), mixer_order(model.config)
    return filled(own, initial_params(params_of(own), params_of(model), orders=orders))


def test_each_layer_as_if_the_model_were_built_so(x64: None) -> None:
    """The student has weights of its own; a restored layer's attention is the teacher's, weights and all."""
    teacher = random_model(lambda rngs: Llama(CONFIG, rngs=rngs))
    student = with_attention(random_model(lambda rngs: Llama(CONFIG, rngs=rngs), seed=2), AUGMENTED)
    batches = [{"tokens": np.random.default_rng(seed).integers(0, 19, (2, 14))} for seed in range(2)]
    found = LayerDivergences.of(range(LAYERS))
    passes: list[int] = []
    # Interrupted after the first batch, and taken up again from what was written down.
    first = next(measure_layers(student, teacher, batches, found, lambda: passes.append(1)))
    again = LayerDivergences(**vars(first))
    [done] = measure_layers(student, teacher, batches, again, lambda: passes.append(1))
    assert (done.batches, done.tokens, len(passes)) == (2, 2 * 2 * 13, 2 * (1 + LAYERS))

    def log_probabilities(model: Llama, tokens: np.ndarray) -> np.ndarray:
        return np.asarray(jax.nn.log_softmax(forward(model, jnp.asarray(tokens[:, :-1]))))

    for layer in (NONE, 1):
        model = student
        if layer != NONE:
            model = with_attention(student, replace(AUGMENTED, layers={layer: "softmax"}))
            own, theirs = model.layers.layers, teacher.layers.layers
            pairs = [(own.attention_norm.scale, theirs.attention_norm.scale)]
            parts = ("query", "key", "value", "out")
            pairs += [(getattr(own.attention, part).kernel, getattr(theirs.attention, part).kernel) for part in parts]
            for mine, given in pairs:
                mine[...] = mine[...].at[layer].set(given[...][layer])
        expected = 0.0
        for batch in batches:
            taught, said = (log_probabilities(each, batch["tokens"]) for each in (teacher, model))
            expected += np.sum(np.exp(taught) * (taught - said))
        np.testing.assert_allclose(done.means[layer], expected / done.tokens, rtol=1e-9)
    assert sorted(done.ranking) == list(range(LAYERS))
    assert done.means[done.ranking[0]] == min(done.means[layer] for layer in range(LAYERS))
