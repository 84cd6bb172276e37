"""The next token, and what a teacher would say in its place (Hinton et al. 2015)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lin_jax.losses.chunked import sums_in_chunks
from lin_jax.losses.cross_entropy import Batch, Sums, Targets, inputs_of, shifted_targets, token_sums
from lin_jax.models.adapters import AdapterConfig
from lin_jax.models.params import Params
from lin_jax.training.objective_configs import DistillationConfig
from lin_jax.training.objectives.next_token import NextToken

# Logits that each of student and teacher makes at once on a device.
LOGITS = 2**25


class Distillation(NextToken):
    """`text_weight * CE + weight * tau^2 * KL(teacher || student)`, within a document.

    In the divergence both are at temperature tau.

    `tau^2` keeps the size of the divergence's gradient. The sums are `[2]`: of the cross entropy, and of the
    divergence, where right is what the teacher finds likeliest.

    Args:
        config: the student's model.
        adapters: on the student, or None.
        distillation: weights and temperature.
    """

    def __init__(self, config: Any, adapters: AdapterConfig | None, distillation: DistillationConfig) -> None:
        super().__init__(config, adapters)
        self._temperature = distillation.temperature
        self.coefficients = (distillation.text_weight, distillation.weight * distillation.temperature**2)

    def counts(self, batch: Batch) -> Int[Array, "2"]:
        """Targets in the same document as their input, for both."""
        return jnp.tile(super().counts(batch), 2)

    def sums(self, params: Params, frozen: Params, batch: Batch) -> Sums:
        """Sums `[2]` over the tokens of a batch."""
        student, teacher = self.parts(params, frozen)[0], frozen["teacher"]
        inputs = inputs_of(batch)
        hidden = (student.hidden(*inputs), jax.lax.stop_gradient(teacher.hidden(*inputs)))
        targets = shifted_targets(batch, 1)

        def sums(rows: Any) -> Sums:
            (own, theirs), (ids, included) = rows
            logits = student.logits(own)
            said = token_sums(logits[..., None, :], Targets(ids[..., None], included[..., None]))
            taught = divergence_sums(logits, teacher.logits(theirs), included, self._temperature)
            return Sums(*(jnp.concatenate(pair) for pair in zip(said, taught, strict=True)))

        vocabulary = student.embed.num_embeddings
        return sums_in_chunks(sums, (hidden, targets), vocabulary=vocabulary, max_logits=LOGITS)

    def figures(self, sums: Sums) -> dict[str, float]:
        """The perplexity, the divergence in nats a token, and how often both models find the same token likeliest."""
        said = Sums(*(part[:1] for part in sums))
        tokens = max(int(sums.tokens[1]), 1)
        return {
            **super().figures(said),
            "teacher_divergence": float(sums.loss[1]) / tokens,
            "teacher_agreement": float(sums.correct[1]) / tokens,
        }


def divergence_sums(
    logits: Float[Array, "*N V"], teacher: Float[Array, "*N V"], included: Bool[Array, "*N"], temperature: float
) -> Sums:
    """Sums `[1]` of `KL(teacher || student)` in nats, at a temperature; right is what the teacher finds likeliest."""
    own, theirs = (jax.nn.log_softmax(each / temperature) for each in (logits, teacher))
    divergence = jnp.sum(jnp.exp(theirs) * (theirs - own), axis=-1)
    same = jnp.argmax(logits, axis=-1) == jnp.argmax(teacher, axis=-1)
    return Sums(
        jnp.sum(jnp.where(included, divergence, 0))[None],
        jnp.sum(same & included)[None],
        jnp.sum(included)[None],
    )
