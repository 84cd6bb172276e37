"""One test class for every implementation: against loops over tokens in float64, and against autodiff in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.backends import FEWER, IMPLEMENTATIONS, KERNELS_FIRST, ONE_KERNEL
from support.cells import cells

from pallas_kernels.augmented_attention import (
    PackedRows,
    PriorContext,
    augmented_attention,
    augmented_attention_reference,
    cpu,
)
from pallas_kernels.implementations import UnsupportedError, choose_implementation, compiling_for

# Of the largest number, for float32 inputs and float32 sums of a few hundred terms.
TOLERANCE = 2e-6


class Case:
    """Random inputs, and rows of several documents that end in padding if asked for."""

    def __init__(
        self,
        length,
        *,
        batch=1,
        heads=2,
        kv_heads=1,
        key_size=32,
        value_size=16,
        group=16,
        width=8,
        packed=False,
        seed=0,
    ):
        rng = np.random.default_rng(seed)
        self.group = group
        self.queries = rng.normal(size=(batch, length, heads, key_size))
        self.keys = rng.normal(size=(batch, length, kv_heads, key_size))
        self.values = rng.normal(size=(batch, length, kv_heads, value_size))
        self.alpha = rng.normal(size=heads)
        self.taps = 0.3 * rng.normal(size=(heads, width))
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
        return self.queries, self.keys, self.values, self.alpha, self.taps

    def run(self, implementation, arrays=None, **options):
        """One program: what is run piece by piece is compiled piece by piece."""

        def run(queries, keys, values, alpha, taps, packed):
            named = {"group_size": self.group, "alpha": alpha, "taps": taps, "packed": packed}
            return augmented_attention(queries, keys, values, **named, implementation=implementation, **options)

        arrays = arrays or [np.asarray(each, np.float32) for each in self.arrays]
        return jax.jit(run)(*arrays, self.packed_rows)

    def expected(self):
        outputs = np.zeros_like(self.cotangents)
        for row in range(len(outputs)):
            for document in set(self.segment_ids[row]) - {0}:
                at = self.segment_ids[row] == document
                rows = [each[row, at] for each in self.arrays[:3]]
                grouped, others = (
                    augmented_attention_reference(*rows, group_size=self.group, **part)
                    for part in ({"alpha": 1.0, "taps": None, "local": None}, {"alpha": None, "taps": self.taps})
                )
                outputs[row, at] = self.alpha[:, None] * grouped + others
        return outputs

    def dense(self, queries, keys, values, alpha, taps):
        """All pairs as one matrix, to be differentiated in float64."""
        share = queries.shape[2] // keys.shape[2]
        unit = lambda rows: rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)  # noqa: E731
        keys, values = jnp.repeat(unit(keys), share, 2), jnp.repeat(values, share, 2)
        scores = jnp.einsum("bthd,bshd->bhts", unit(queries), keys)
        lag = np.arange(self.positions.shape[1])[:, None] - np.arange(self.positions.shape[1])
        same = (self.segment_ids[:, :, None] == self.segment_ids[:, None]) & self.there[:, None] & (lag >= 0)
        group = self.positions // self.group
        local = same & (group[:, :, None] == group[:, None])
        filtered = jnp.where((lag >= 0) & (lag < taps.shape[1]), taps[:, np.clip(lag, 0, taps.shape[1] - 1)], 0)
        weights = jnp.where(local[:, None], jnp.maximum(scores, 0) ** 2, alpha[:, None, None] * scores) + filtered
        return jnp.einsum("bhts,bshe->bthe", jnp.where(same[:, None], weights, 0), values)


def difference(found, expected):
    scale = np.abs(expected).max()
    return np.abs(np.asarray(found, np.float64) - expected).max() / (scale if scale > 0 else 1)


class TestImplementation:
    @pytest.mark.parametrize("implementation", FEWER)
    @pytest.mark.parametrize("length", cells([1, 17], [15, 16, 300]))
    def test_whole_rows(self, implementation, length):
        case = Case(length)
        assert difference(case.run(implementation)[0], case.expected()) < TOLERANCE

    @pytest.mark.parametrize("implementation", ONE_KERNEL)
    @pytest.mark.parametrize(("length", "size"), cells([(500, 128)], [(1000, 64)]))
    def test_long_rows_of_large_heads(self, implementation, length, size):
        case = Case(length, heads=1, key_size=size, value_size=size, group=64, width=32)
        assert difference(case.run(implementation)[0], case.expected()) < TOLERANCE

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    @pytest.mark.thorough
    def test_the_largest_heads(self, implementation):
        """In float32 their tiles need more registers than a GPU has."""
        case = Case(200, heads=1, key_size=256, value_size=256, group=64, width=32)
        arrays = [jnp.asarray(each, jnp.bfloat16) for each in case.arrays]
        case.queries, case.keys, case.values, case.alpha, case.taps = (np.asarray(each, np.float64) for each in arrays)
        assert difference(case.run(implementation, arrays)[0], case.expected()) < 2**-7

    @pytest.mark.parametrize("implementation", KERNELS_FIRST)
    def test_documents_heads_and_sizes(self, implementation):
        case = Case(280, batch=2, heads=4, kv_heads=2, key_size=64, value_size=32, group=64, width=32, packed=True)
        outputs = np.asarray(case.run(implementation)[0])
        assert difference(outputs[case.there], case.expected()[case.there]) < TOLERANCE

    @pytest.mark.parametrize("implementation", FEWER)
    def test_what_is_not_there_is_not_read(self, implementation):
        case = Case(140, packed=True)
        expected = np.asarray(case.run(implementation)[0])
        absent = ~case.there[..., None, None]
        case.keys, case.values = (np.where(absent, np.nan, each) for each in (case.keys, case.values))
        outputs = np.asarray(case.run(implementation)[0])
        np.testing.assert_array_equal(outputs[case.there], expected[case.there])

    @pytest.mark.parametrize("implementation", KERNELS_FIRST)
    @pytest.mark.parametrize("packed", cells([True], [False]))
    def test_gradients(self, implementation, packed):
        case = Case(300, heads=4, kv_heads=2, packed=packed)
        with jax.enable_x64(True):
            gradients = jax.jit(lambda arrays, cotangents: jax.vjp(case.dense, *arrays)[1](cotangents))
            expected = [np.asarray(each) for each in gradients(case.arrays, case.cotangents)]
        arrays = [np.asarray(each, np.float32) for each in case.arrays]
        weight = np.asarray(case.cotangents, np.float32)
        total = jax.grad(lambda *arrays: jnp.sum(case.run(implementation, arrays)[0] * weight), range(5))
        found = jax.jit(total)(*arrays)
        for name, one, other in zip(("queries", "keys", "values", "alpha", "taps"), found, expected, strict=True):
            assert difference(one, other) < TOLERANCE, name

    @pytest.mark.parametrize("implementation", ONE_KERNEL)
    def test_goes_on_from_a_start(self, implementation):
        """Outputs, memory and gradients of a row in two pieces are those of the whole row."""
        case, cut = Case(150, heads=2, group=16, width=24), 40
        arrays = [jnp.asarray(each, jnp.float32) for each in case.arrays]
        weight = jnp.asarray(case.cotangents, jnp.float32)

        def packed(begin, end):
            ones = jnp.ones((1, end - begin), jnp.int32)
            return PackedRows(
                ones, begin + jnp.arange(end - begin)[None], *jnp.ones((2, 1), jnp.int32), jnp.array([end])
            )

        def piece(queries, keys, values, alpha, taps, begin, end, prior):
            rows = [each[:, begin:end] for each in (queries, keys, values)]
            options = {"group_size": 16, "alpha": alpha, "taps": taps, "implementation": implementation}
            return augmented_attention(*rows, packed=packed(begin, end), prior=prior, **options)

        def in_pieces(queries, keys, values, alpha, taps):
            first, memory = piece(queries, keys, values, alpha, taps, 0, cut, None)
            scored = keys / jnp.linalg.norm(keys, axis=-1, keepdims=True)
            before = jnp.arange(cut - 24, cut)[None]
            prior = PriorContext(memory, scored[:, cut - 24 : cut], values[:, cut - 24 : cut], before, before < 32)
            second, after = piece(queries, keys, values, alpha, taps, cut, 150, prior)
            return jnp.sum(jnp.concatenate([first, second], axis=1) * weight) + jnp.sum(after**2)

        def whole(queries, keys, values, alpha, taps):
            outputs, memory = piece(queries, keys, values, alpha, taps, 0, 150, None)
            return jnp.sum(outputs * weight) + jnp.sum(memory**2)

        found, expected = (jax.jit(jax.value_and_grad(each, range(5)))(*arrays) for each in (in_pieces, whole))
        assert difference(found[0], expected[0]) < TOLERANCE
        for one, other in zip(found[1], expected[1], strict=True):
            assert difference(one, np.asarray(other)) < TOLERANCE

    @pytest.mark.parametrize("implementation", FEWER)
    def test_branches_may_be_left_out(self, implementation):
        case = Case(40)
        arrays = [np.asarray(each, np.float32) for each in case.arrays]
        options = {"group_size": case.group, "implementation": implementation}

        @jax.jit
        def outputs(*arrays):
            *rows, alpha, taps = arrays
            parts = ({"alpha": alpha, "local": False}, {"taps": taps, "local": False}, {})
            return sum(augmented_attention(*rows, **part, **options)[0] for part in parts)

        assert difference(outputs(*arrays), case.expected()) < TOLERANCE

    @pytest.mark.parametrize("implementation", KERNELS_FIRST)
    def test_half_precision(self, implementation):
        """Bfloat16 in and out; sums are not rounded on the way."""
        case = Case(300)
        arrays = [jnp.asarray(each, jnp.bfloat16) for each in case.arrays]
        case.queries, case.keys, case.values, case.alpha, case.taps = (np.asarray(each, np.float64) for each in arrays)
        outputs, memory = case.run(implementation, arrays)
        assert outputs.dtype == jnp.bfloat16
        assert memory.dtype == jnp.float32
        assert difference(outputs, case.expected()) < 2**-7


@pytest.mark.parametrize(
    "options", cells([{"packed": True, "group": 64}, {"width": 40}], [{}, {"packed": True, "kv_heads": 4}])
)
def test_on_cpus_as_elsewhere(options, monkeypatch):
    """XLA's program for CPUs, with few blocks and with many: numbers and gradients of the one for all platforms."""
    case = Case(300, **{"batch": 2, "heads": 4, "kv_heads": 2, **options})
    weights = np.random.default_rng(1).normal(size=(2, case.keys.shape[2], 32, 16)).astype(np.float32)

    def total(*arrays):
        outputs, memory = case.run("xla", arrays)
        # Whole rows give no memory.
        return jnp.sum(outputs * case.cotangents) + (jnp.sum(memory * weights) if case.packed else 0)

    def run():
        return jax.jit(jax.value_and_grad(lambda *arrays: total(*arrays), range(5)))(*arrays)

    arrays = [np.asarray(each, np.float32) for each in case.arrays]
    value, found = run()
    monkeypatch.setattr(cpu, "suits", lambda problem: False)
    expected, wanted = run()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name, one, other in zip(("queries", "keys", "values", "alpha", "taps"), found, wanted, strict=True):
        assert difference(one, np.asarray(other)) < TOLERANCE, name


def test_choice_by_platform_and_by_name(caplog):
    free, taken = {"xla": None, "tpu": None}, {"xla": None, "tpu": "it is too wide"}
    assert choose_implementation("it", None, free) == "xla"
    assert choose_implementation("it", None, free, platform="tpu") == "tpu"
    with compiling_for("tpu"):
        assert choose_implementation("it", None, free) == "tpu"
        assert choose_implementation("it", None, taken) == choose_implementation("it", None, taken) == "xla"
    assert [record.message for record in caplog.records] == ["it: 'xla' instead of 'tpu' (it is too wide)"]
    assert choose_implementation("it", ["tpu", "xla"], free) == "xla"
    with pytest.raises(
        UnsupportedError, match="'tpu' \\(it runs on tpu, this is cpu\\); choose among xla, tpu, or None"
    ):
        choose_implementation("it", "tpu", free)
    with pytest.raises(UnsupportedError, match=r"'cuda' \(there is no such implementation\)"):
        choose_implementation("it", "cuda", free)


def test_inputs_that_do_not_fit():
    rows = jnp.zeros((1, 8, 2, 4))
    with pytest.raises(ValueError, match="do not fit each other"):
        augmented_attention(rows, rows[:, :7], rows, group_size=4)
    with pytest.raises(ValueError, match="2 query heads are no multiple of 3"):
        augmented_attention(rows, jnp.zeros((1, 8, 3, 4)), jnp.zeros((1, 8, 3, 4)), group_size=4)
    with pytest.raises(ValueError, match="alpha has 3 heads"):
        augmented_attention(rows, rows, rows, group_size=4, alpha=jnp.zeros(3))
    with pytest.raises(UnsupportedError, match="not all float32 or all bfloat16"):
        augmented_attention(rows, rows, rows.astype(jnp.float16), group_size=4, implementation="tpu_interpreted")
