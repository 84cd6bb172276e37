"""Rows that lie along a mesh's axis `sequence`: mixers are what they are on one device."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from support.processes import printed

from lin_jax.attention import QKV, AttentionConfig, build_mixer, whole_rows
from lin_jax.errors import UserError


def test_mixers_are_those_of_one_device_and_bytes_do_not_grow() -> None:
    """Values and gradients over a mesh of eight devices, in a process of its own."""
    *cases, float32, sent = (line.split() for line in printed("over_a_sequence.py", devices=8))
    assert len(cases) == 4
    assert {words[0]: float(words[-1]) for words in cases if not float(words[-1]) < 1e-9} == {}
    assert float(float32[1]) < 1e-5
    assert sent[1] == sent[2], "what is sent grows with the text"


@pytest.mark.thorough
def test_further_mixers_are_those_of_one_device() -> None:
    cases = [line.split() for line in printed("over_a_sequence.py", "further", devices=8)]
    assert len(cases) == 17
    assert {words[0]: float(words[-1]) for words in cases if not float(words[-1]) < 1e-9} == {}


@pytest.mark.parametrize(
    ("length", "kernel_size", "message"),
    [
        (30, 13, "rows of 30 tokens cannot be cut for 4 devices .*'sequence'; give a multiple of 4"),
        (28, 13, "leave 7 to each of 4 devices .* a group of 8 "),
        (40, 63, "leave 10 to each of 4 devices .* the 31 values"),
    ],
)
def test_rows_that_do_not_fit_are_refused(length: int, kernel_size: int, message: str) -> None:
    mixer = build_mixer(AttentionConfig("augmented", 8, kernel_size), heads=2, kv_heads=2, head_dim=4, rngs=nnx.Rngs(0))
    rows = jax.ShapeDtypeStruct((1, length, 2, 4), jnp.float32)
    with jax.sharding.use_abstract_mesh(AbstractMesh((4,), ("sequence",))), pytest.raises(UserError, match=message):
        jax.eval_shape(lambda *inputs: mixer.parallel(QKV(*inputs), whole_rows(1, length))[0], rows, rows, rows)
