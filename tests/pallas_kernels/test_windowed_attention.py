"""One test class for every implementation: against loops over tokens in float64, and against autodiff in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.backends import FEWER, IMPLEMENTATIONS, KERNELS_FIRST, ONE_KERNEL
from support.cells import cells

from pallas_kernels.augmented_attention import PackedRows
from pallas_kernels.implementations import UnsupportedError
from pallas_kernels.linear_attention import Memory
from pallas_kernels.windowed_attention import (
    FeatureWeights,
    WindowedPrior,
    windowed_attention,
    windowed_attention_reference,
    windowed_implementation,
)

# Of the largest number, for float32 inputs and float32 sums of a few hundred terms.
TOLERANCE = 2e-6
NAMES = ("queries", "keys", "values", "weights", "balance", "log_decays")


class Case:
    """Random inputs, and rows of several documents that end in padding if asked for."""

    def __init__(
        self,
        length,
        *,
        batch=1,
        heads=2,
        kv_heads=1,
        key_size=16,
        value_size=8,
        features="exponential",
        size=16,
        group=16,
        groups=1,
        tokens=None,
        sinks=0,
        decay=None,
        packed=False,
        seed=0,
    ):
        rng = np.random.default_rng(seed)
        self.options = {"features": features, "group_size": group, "groups": groups, "tokens": tokens, "sinks": sinks}
        self.options["scale"] = key_size**-0.5
        self.queries = rng.normal(size=(batch, length, heads, key_size))
        self.keys = rng.normal(size=(batch, length, kv_heads, key_size))
        self.values = rng.normal(size=(batch, length, kv_heads, value_size))
        biases = (rng.normal(size=(heads, size)) / 4, rng.normal(size=(kv_heads, size)) / 4)
        self.weights = FeatureWeights(
            rng.normal(size=(heads, size, key_size)) / 2,
            rng.normal(size=(kv_heads, size, key_size)) / 2,
            *(biases if features == "exponential" else (None, None)),
        )
        # Near and far weigh about the same, so that no gradient is what is left of much larger numbers.
        self.balance = rng.normal(size=heads) + (3 if features == "hedgehog" else 0)
        self.log_decays = None
        if decay == "constant":
            self.log_decays = np.broadcast_to(-rng.uniform(0.002, 0.02, kv_heads), (batch, length, kv_heads))
        elif decay == "token":
            self.log_decays = -rng.uniform(0.0, 0.04, (batch, length, kv_heads))
        self.cotangents = rng.normal(size=(batch, length, heads, value_size))
        self.segment_ids = np.ones((batch, length), int)
        if packed:
            self.segment_ids = np.sort(rng.integers(1, 4, size=(batch, length)), axis=1)
            self.segment_ids[:, length - length // 8 :] = 0
        self.there = self.segment_ids > 0
        self.cotangents = np.where(self.there[..., None, None], self.cotangents, 0)
        begins = [[np.flatnonzero(row == row[t])[0] for t in range(length)] for row in self.segment_ids]
        self.positions = np.arange(length) - np.array(begins)
        self.packed = packed

    @property
    def packed_rows(self):
        if not self.packed:
            return None
        last = np.array([row[row > 0][-1] for row in self.segment_ids])
        tokens = np.sum(self.segment_ids == last[:, None], axis=1)
        parts = (self.segment_ids, self.positions, self.segment_ids[:, 0], last, tokens)
        return PackedRows(*(np.asarray(part, np.int32) for part in parts))

    @property
    def arrays(self):
        return tuple(getattr(self, name) for name in NAMES)

    def of(self, dtype):
        return jax.tree.map(lambda each: np.asarray(each, dtype), self.arrays)

    def run(self, implementation, arrays=None, **options):
        """One program: what is run piece by piece is compiled piece by piece."""

        def run(queries, keys, values, weights, balance, log_decays, packed):
            named = {"balance": balance, "log_decays": log_decays, "packed": packed, "implementation": implementation}
            return windowed_attention(queries, keys, values, weights, **named, **self.options, **options)

        return jax.jit(run)(*(arrays or self.of(np.float32)), self.packed_rows)

    def expected(self):
        outputs = np.zeros_like(self.cotangents)
        for row in range(len(outputs)):
            for document in set(self.segment_ids[row]) - {0}:
                at = self.segment_ids[row] == document
                decays = None if self.log_decays is None else self.log_decays[row, at]
                outputs[row, at] = windowed_attention_reference(
                    *(each[row, at] for each in self.arrays[:3]),
                    self.weights,
                    balance=self.balance,
                    log_decays=decays,
                    **self.options,
                )
        return outputs

    def dense(self, queries, keys, values, weights, balance, log_decays):
        """All pairs as one matrix, to be differentiated in float64; `balance` is one of each token `[B, T, H]`."""
        share, scale = queries.shape[2] // keys.shape[2], self.options["scale"]
        keys, values = jnp.repeat(keys, share, 2), jnp.repeat(values, share, 2)
        maps = weights.queries, jnp.repeat(weights.keys, share, 0)
        biases = [None, None]
        if weights.query_bias is not None:
            biases = weights.query_bias, jnp.repeat(weights.key_bias, share, 0)
        phi = [self.phi(*each) for each in zip((queries, keys), maps, biases, strict=True)]
        lag = np.arange(queries.shape[1])[:, None] - np.arange(queries.shape[1])
        both = (self.segment_ids[:, :, None] == self.segment_ids[:, None]) & self.there[:, None] & (lag >= 0)
        if self.options["tokens"] is None:
            group = self.positions // self.options["group_size"]
            near = both & (group[:, :, None] - group[:, None] <= self.options["groups"])
        else:
            near = both & (lag < self.options["tokens"])
        near = near | both & (self.positions < self.options["sinks"])[:, None]
        far = jnp.moveaxis(jnp.exp(balance), 1, 2)[..., None] * jnp.einsum("bthm,bshm->bhts", *phi)
        if log_decays is not None:
            clock = jnp.moveaxis(jnp.cumsum(jnp.repeat(log_decays, share, 2), axis=1), 1, 2)
            far = far * jnp.exp(jnp.where(lag >= 0, clock[..., :, None] - clock[..., None, :], 0))
        scores = jnp.exp(scale * jnp.einsum("bthd,bshd->bhts", queries, keys))
        pairs = jnp.where(near[:, None], scores, jnp.where(both[:, None], far, 0))
        total = jnp.sum(pairs, axis=-1, keepdims=True)
        return jnp.einsum("bhts,bshe->bthe", pairs / jnp.where(total == 0, 1, total), values)

    def phi(self, rows, directions, bias):
        if self.options["features"] == "hedgehog":
            exponents = jnp.einsum("bthd,hmd->bthm", rows, directions)
            return jax.nn.softmax(jnp.concatenate([exponents, -exponents], axis=-1), axis=-1)
        rows = rows * self.options["scale"] ** 0.5
        exponents = jnp.einsum("bthd,hmd->bthm", rows, directions) + bias
        return jnp.exp(exponents - jnp.sum(rows**2, axis=-1, keepdims=True) / 2) / directions.shape[1] ** 0.5


def difference(found, expected):
    scale = np.abs(expected).max()
    return np.abs(np.asarray(found, np.float64) - expected).max() / (scale if scale > 0 else 1)


def several_blocks(implementation):
    """Tokens of more than one block; Triton's interpreter takes its time for each."""
    return 100 if implementation == "gpu_interpreted" else 300


# Both kinds of windows, both maps, with decay and without; and more of each.
GROUPS = {"group": 16, "groups": 1, "features": "exponential", "decay": "token"}
SLIDING = {"tokens": 20, "features": "hedgehog", "size": 8, "decay": None}
FURTHER = (
    {"group": 16, "groups": 2, "features": "hedgehog", "decay": "constant"},
    {"group": 24, "groups": 0, "features": "exponential", "decay": None},
    {"tokens": 1, "features": "exponential", "decay": "token"},
    {"tokens": 140, "features": "exponential", "decay": "constant"},
    {"tokens": 1, "sinks": 1, "features": "hedgehog", "size": 8, "decay": "constant"},
    {"group": 16, "groups": 0, "sinks": 20, "features": "exponential", "decay": None},
)
# Sinks beside a sliding window: they leave it early, one after another.
SINKS = {"tokens": 10, "sinks": 5, "features": "exponential", "decay": "token"}


class TestImplementation:
    @pytest.mark.parametrize("implementation", FEWER)
    @pytest.mark.parametrize("kind", cells([GROUPS], [SLIDING, SINKS, *FURTHER]))
    @pytest.mark.parametrize("length", cells([17], [1, 15, 300]))
    def test_whole_rows(self, implementation, kind, length):
        case = Case(length, **kind)
        assert difference(case.run(implementation)[0], case.expected()) < TOLERANCE

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    @pytest.mark.parametrize("kind", cells([SLIDING], [GROUPS, SINKS, *FURTHER]))
    def test_documents_heads_and_sizes(self, implementation, kind):
        case = Case(several_blocks(implementation), batch=2, heads=4, kv_heads=2, key_size=32, packed=True, **kind)
        outputs = np.asarray(case.run(implementation)[0])
        assert difference(outputs[case.there], case.expected()[case.there]) < TOLERANCE

    @pytest.mark.parametrize("implementation", FEWER)
    @pytest.mark.thorough
    def test_what_is_not_there_is_not_read(self, implementation):
        case = Case(140, packed=True, **GROUPS)
        expected = np.asarray(case.run(implementation)[0])
        absent = ~case.there[..., None, None]
        case.keys, case.values = (np.where(absent, np.nan, each) for each in (case.keys, case.values))
        outputs = np.asarray(case.run(implementation)[0])
        np.testing.assert_array_equal(outputs[case.there], expected[case.there])

    @pytest.mark.parametrize("implementation", KERNELS_FIRST)
    @pytest.mark.parametrize("kind", cells([GROUPS], [SINKS, SLIDING, *FURTHER]))
    @pytest.mark.parametrize("packed", cells([True], [False]))
    def test_gradients(self, implementation, kind, packed):
        length = several_blocks(implementation)
        case = Case(length, packed=True, **kind) if packed else Case(length + 50, batch=2, **kind)
        with jax.enable_x64(True):
            arrays = list(case.of(jnp.float64))
            arrays[4] = jnp.broadcast_to(arrays[4], case.cotangents.shape[:3])
            pull = jax.jit(lambda arrays, cotangents: jax.vjp(case.dense, *arrays)[1](cotangents))
            expected = list(jax.tree.map(np.asarray, pull(arrays, jnp.asarray(case.cotangents))))
        # The balance's gradient is a sum over all tokens that cancels: it is as exact as its terms are.
        terms, expected[4] = np.abs(expected[4]).sum((0, 1)).max(), expected[4].sum((0, 1))
        weight = jnp.asarray(case.cotangents, jnp.float32)
        total = jax.grad(lambda *arrays: jnp.sum(case.run(implementation, arrays)[0] * weight), range(6))
        found = jax.jit(total)(*case.of(jnp.float32))
        for name, one, other in zip(NAMES, found, expected, strict=True):
            for mine, its in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
                scale = terms if name == "balance" else np.abs(its).max()
                assert np.abs(np.asarray(mine, np.float64) - its).max() <= TOLERANCE * scale, name

    @pytest.mark.parametrize("implementation", ONE_KERNEL)
    @pytest.mark.parametrize("kind", cells([SINKS], [GROUPS, SLIDING, *FURTHER]))
    def test_goes_on_from_a_start(self, implementation, kind):
        """Outputs, memory and gradients of a row in two pieces are those of the whole row."""
        case, cut = Case(150, **kind), 70
        arrays = case.of(jnp.float32)
        weight = jnp.asarray(case.cotangents, jnp.float32)
        group, tokens = case.options["group_size"], case.options["tokens"]
        # The row's second piece begins with the window of its first query.
        start = (cut // group - case.options["groups"]) * group if tokens is None else cut - tokens + 1
        start = max(start, 0)

        def piece(arrays, begin, end, prior):
            queries, keys, values, weights, balance, log_decays = arrays
            rows = [None if each is None else each[:, begin:end] for each in (queries, keys, values, log_decays)]
            ones = jnp.ones((1, end - begin), jnp.int32)
            packed = PackedRows(
                ones, begin + jnp.arange(end - begin)[None], *jnp.ones((2, 1), jnp.int32), jnp.array([end])
            )
            options = case.options | {"balance": balance, "log_decays": rows[3], "packed": packed, "prior": prior}
            return windowed_attention(*rows[:3], weights, **options, implementation=implementation)

        def in_pieces(*arrays):
            first, memory = piece(arrays, 0, cut, None)
            kept = [None if each is None else each[:, start:cut] for each in (arrays[1], arrays[2], arrays[5])]
            count = case.options["sinks"]
            sinks = [each[:, :count] if count else None for each in arrays[1:3]]
            prior = WindowedPrior(memory, *kept, jnp.arange(start, cut)[None], *sinks)
            second, after = piece(arrays, cut, 150, prior)
            return jnp.sum(jnp.concatenate([first, second], axis=1) * weight) + sum(jnp.sum(x**2) for x in after)

        def whole(*arrays):
            outputs, memory = piece(arrays, 0, 150, None)
            return jnp.sum(outputs * weight) + sum(jnp.sum(x**2) for x in memory)

        found, expected = (jax.jit(jax.value_and_grad(each, range(6)))(*arrays) for each in (in_pieces, whole))
        assert difference(found[0], expected[0]) < TOLERANCE
        for one, other in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
            assert difference(one, np.asarray(other)) < TOLERANCE

    @pytest.mark.parametrize("implementation", FEWER)
    @pytest.mark.parametrize("kind", cells([], [GROUPS, SLIDING]))
    def test_half_precision(self, implementation, kind):
        """Bfloat16 in and out; sums are not rounded on the way."""
        case = Case(300, **kind)
        arrays = case.of(jnp.float32)
        arrays = (*(jnp.asarray(each, jnp.bfloat16) for each in arrays[:3]), *arrays[3:])
        case.queries, case.keys, case.values = (np.asarray(each, np.float64) for each in arrays[:3])
        outputs, memory = case.run(implementation, arrays)
        assert outputs.dtype == jnp.bfloat16
        assert memory.values.dtype == memory.keys.dtype == jnp.float32
        assert difference(outputs, case.expected()) < 2**-7


def test_inputs_that_do_not_fit():
    rows = jnp.zeros((1, 8, 2, 4))
    weights, options = FeatureWeights(jnp.zeros((2, 4, 4)), jnp.zeros((2, 4, 4))), {"features": "hedgehog", "scale": 1}
    with pytest.raises(ValueError, match="do not fit each other"):
        windowed_attention(rows, rows[:, :7], rows, weights, **options)
    with pytest.raises(ValueError, match=r"weights.keys has the shape \(3, 4, 4\); give \[2, m, 4\]"):
        windowed_attention(rows, rows, rows, weights._replace(keys=jnp.zeros((3, 4, 4))), **options)
    with pytest.raises(ValueError, match="features is 'relu'; choose one of exponential, hedgehog"):
        windowed_attention(rows, rows, rows, weights, features="relu", scale=1)
    with pytest.raises(ValueError, match="tokens is 0; give at least 1"):
        windowed_attention(rows, rows, rows, weights, tokens=0, **options)
    prior = WindowedPrior(Memory(rows, rows), rows, rows, None, jnp.zeros((1, 8)))
    with pytest.raises(ValueError, match="a prior context needs packed rows"):
        windowed_attention(rows, rows, rows, weights, prior=prior, **options)
    half = rows.astype(jnp.float16)
    with pytest.raises(UnsupportedError, match="not all float32 or all bfloat16"):
        windowed_attention(half, half, half, weights, implementation="tpu_interpreted", **options)
    with pytest.raises(ValueError, match="sinks is -1; give zero or more"):
        windowed_attention(rows, rows, rows, weights, sinks=-1, **options)
    packed = PackedRows(*jnp.ones((2, 1, 8), int), *jnp.ones((3, 1), int))
    with pytest.raises(ValueError, match="the prior context has 0 sinks, and sinks is 2; give as many in both"):
        windowed_attention(rows, rows, rows, weights, packed=packed, prior=prior, sinks=2, **options)
    assert windowed_implementation(rows, rows, rows, 8, "xla") == "xla"
