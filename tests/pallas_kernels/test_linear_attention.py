"""One test class for every implementation: against a loop over tokens in float64, and its numeric gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.backends import FEWER, IMPLEMENTATIONS, KERNELS_FIRST, ONE_KERNEL
from support.cells import cells

from pallas_kernels.implementations import UnsupportedError
from pallas_kernels.linear_attention import Memory, linear_attention, linear_attention_reference

# Of the largest number, for float32 inputs and float32 sums of a few hundred terms.
TOLERANCE = 3e-6
KINDS = {"sums": {}, "divided": {"floor": 0.0}, "floor": {"floor": 6.0}, "decay": {"decay": True}}
KINDS["divided decay"] = {"floor": 0.0, "decay": True}
DIFFERENTIATED = [("divided decay", True)]
REST = [(kind, packed) for kind in KINDS for packed in (True, False) if (kind, packed) not in DIFFERENTIATED]


class Case:
    """Random inputs with positive features, rows of documents with padding if asked for, and a memory before them."""

    def __init__(self, length, *, batch=1, heads=2, kv_heads=1, sizes=(16, 32), packed=False, floor=None, decay=False):
        rng = np.random.default_rng(length)
        key_size, value_size = sizes
        self.queries, self.keys = (rng.random((batch, length, n, key_size)) for n in (heads, kv_heads))
        self.values, self.cotangents = (rng.normal(size=(batch, length, n, value_size)) for n in (kv_heads, heads))
        self.memory = rng.normal(size=(batch, kv_heads, key_size, value_size))
        self.normaliser = rng.random((batch, kv_heads, key_size))
        self.slopes = rng.normal(size=self.memory.shape), rng.normal(size=self.normaliser.shape)
        # Numbers of float32: what is rounded of them counts as often as there are tokens.
        self.decay = np.linspace(0.5, 0.999, kv_heads).astype(np.float32).astype(float) if decay else None
        self.floor = floor
        self.segment_ids = None
        self.there = np.ones((batch, length), bool)
        if packed:
            self.segment_ids = 9 - np.sort(rng.integers(1, 4, size=(batch, length)), axis=1)
            self.segment_ids[:, : length // 9] = self.segment_ids[:, length - length // 8 :] = 0
            self.there = self.segment_ids > 0
        self.cotangents = np.where(self.there[..., None, None], self.cotangents, 0)

    @property
    def arrays(self):
        return self.queries, self.keys, self.values, self.memory, self.normaliser

    def narrow(self, dtype=jnp.float32):
        rows = [np.asarray(each, dtype) for each in self.arrays[:3]]
        return [*rows, *(np.asarray(each, np.float32) for each in self.arrays[3:])]

    def run(self, implementation, arrays=None):
        """One program: what is run piece by piece is compiled piece by piece."""

        def run(queries, keys, values, memory, normaliser, decay, segment_ids):
            return linear_attention(
                queries,
                keys,
                values,
                decay=decay,
                floor=self.floor,
                segment_ids=segment_ids,
                start=Memory(memory, normaliser),
                implementation=implementation,
            )

        return jax.jit(run)(*(self.narrow() if arrays is None else arrays), self.decay, self.segment_ids)

    def expected(self):
        """Outputs, and the memory after the last document of each row."""
        outputs, after = np.zeros_like(self.cotangents), []
        for row in range(len(outputs)):
            named = self.there[row].astype(int) if self.segment_ids is None else self.segment_ids[row]
            memory, normaliser = self.memory[row], self.normaliser[row]
            for document in dict.fromkeys(named[named > 0].tolist()):
                at = named == document
                rows = [each[row, at] for each in self.arrays[:3]]
                options = {"decay": self.decay, "floor": self.floor, "memory": memory, "normaliser": normaliser}
                outputs[row, at], *left = linear_attention_reference(*rows, **options)
                memory = normaliser = None
            after.append(left)
        return outputs, *(np.stack(each) for each in zip(*after, strict=True))

    def dense(self, queries, keys, values, memory, normaliser):
        """All pairs as one matrix, to be differentiated in float64; the sum of everything that comes out, weighted."""
        share = queries.shape[2] // keys.shape[2]
        named = self.there.astype(int) if self.segment_ids is None else self.segment_ids
        time = np.cumsum(named > 0, axis=1)
        first = np.array([row[row > 0][0] for row in named])
        last = np.array([row[row > 0][-1] for row in named])
        kept = np.ones(keys.shape[2]) if self.decay is None else self.decay
        lag = time[:, :, None] - time[:, None]
        same = (named[:, :, None] == named[:, None]) & (named > 0)[:, None] & np.tril(np.ones(lag.shape[1:], bool))
        factor = np.where(same[:, None], kept[:, None, None] ** np.maximum(lag, 0)[:, None], 0)
        reads = (named == first[:, None]) & (named > 0)
        since = np.where(reads[:, None], kept[:, None] ** time[:, None], 0)
        wide = lambda part, axis: jnp.repeat(part, share, axis)  # noqa: E731
        weights = jnp.einsum("bthd,bshd->bhts", queries, wide(keys, 2)) * wide(factor, 1)
        sums = jnp.einsum("bhts,bshe->bthe", weights, wide(values, 2))
        sums += jnp.einsum("bht,bthd,bhde->bthe", wide(since, 1), queries, wide(memory, 1))
        if self.floor is not None:
            total = jnp.sum(weights, axis=3).swapaxes(1, 2)
            total += jnp.einsum("bht,bthd,bhd->bth", wide(since, 1), queries, wide(normaliser, 1))
            total = jnp.maximum(total, self.floor) if self.floor else jnp.where(total == 0, 1, total)
            sums = sums / total[..., None]
        joins = np.where((named == last[:, None])[:, None], kept[:, None] ** (time[:, -1:] - time)[:, None], 0)
        stays = (first == last)[:, None] * kept ** time[:, -1:]
        after = jnp.einsum("bkt,btkd,btke->bkde", joins, keys, values) + stays[..., None, None] * memory
        left = jnp.einsum("bkt,btkd->bkd", joins, keys) + stays[..., None] * normaliser
        return self.weighed(sums, after, left)

    def weighed(self, outputs, memory, normaliser):
        after = jnp.sum(memory * self.slopes[0]) + jnp.sum(normaliser * self.slopes[1])
        return jnp.sum(outputs * self.cotangents) + after


def difference(found, expected):
    return np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()


class TestImplementation:
    @pytest.mark.parametrize("implementation", FEWER)
    @pytest.mark.parametrize("length", cells([1, 65], [63, 64, 300]))
    @pytest.mark.parametrize("kind", KINDS)
    def test_whole_rows(self, implementation, kind, length):
        case = Case(length, **KINDS[kind])
        outputs, after = case.run(implementation)
        for one, other in zip((outputs, *after), case.expected(), strict=True):
            assert difference(one, other) < TOLERANCE

    @pytest.mark.parametrize("implementation", ONE_KERNEL)
    @pytest.mark.parametrize(("length", "size"), cells([(500, 128)], [(1000, 64)]))
    def test_long_rows_of_large_heads(self, implementation, length, size):
        case = Case(length, heads=1, sizes=(size, size), **KINDS["divided decay"])
        outputs, after = case.run(implementation)
        for one, other in zip((outputs, *after), case.expected(), strict=True):
            assert difference(one, other) < TOLERANCE

    @pytest.mark.parametrize("implementation", ONE_KERNEL)
    @pytest.mark.parametrize("kind", cells(["divided decay"], ["divided"]))
    def test_documents_and_heads(self, implementation, kind):
        case = Case(290, batch=3, heads=4, kv_heads=2, sizes=(64, 16), packed=True, **KINDS[kind])
        outputs, after = case.run(implementation)
        expected, *memory = case.expected()
        assert difference(np.asarray(outputs)[case.there], expected[case.there]) < TOLERANCE
        for one, other in zip(after, memory, strict=True):
            assert difference(one, other) < TOLERANCE

    @pytest.mark.parametrize("implementation", ONE_KERNEL)
    @pytest.mark.parametrize(("kind", "packed"), cells(DIFFERENTIATED, REST))
    def test_gradients(self, implementation, kind, packed):
        case = Case(280, batch=2, heads=4, kv_heads=2, packed=packed, **KINDS[kind])
        with jax.enable_x64(True):
            expected = jax.jit(jax.grad(case.dense, range(5)))(*case.arrays)

        def total(*arrays):
            outputs, after = case.run(implementation, arrays)
            return case.weighed(jnp.where(case.there[..., None, None], outputs, 0), *after)

        found = jax.jit(jax.grad(total, range(5)))(*case.narrow())
        names = ("queries", "keys", "values", "memory", "normaliser")
        for name, one, other in zip(names, found, expected, strict=True):
            if np.any(other):
                assert difference(one, np.asarray(other)) < TOLERANCE, name
            else:
                assert not np.any(one), name

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_tiny_normalisers(self, implementation):
        """Divisors down to 1e-30, whose squares are zero: scaled queries change neither outputs nor other gradients."""
        case = Case(70, floor=0.0)
        scales = np.logspace(0, -31, 70, dtype=np.float32)[:, None, None]
        case.slopes = [np.zeros_like(each) for each in case.slopes]
        with jax.enable_x64(True):
            expected = jax.jit(jax.grad(case.dense, range(5)))(*case.arrays)

        def total(*arrays):
            outputs, after = case.run(implementation, arrays)
            return case.weighed(outputs, *after), outputs

        queries, *others = case.narrow()
        (slope, *found), outputs = jax.jit(jax.grad(total, range(5), has_aux=True))(queries * scales, *others)
        assert difference(outputs, case.expected()[0]) < TOLERANCE
        for one, other in zip((slope * scales, *found), expected, strict=True):
            assert difference(one, np.asarray(other)) < TOLERANCE

    @pytest.mark.parametrize("implementation", ONE_KERNEL)
    def test_what_is_not_there_is_not_read(self, implementation):
        case = Case(140, packed=True, floor=0.0, decay=True)
        expected = case.run(implementation)
        absent = ~case.there[..., None, None]
        case.queries, case.keys, case.values = (
            np.where(absent, np.nan, each) for each in (case.queries, case.keys, case.values)
        )
        found = case.run(implementation)
        np.testing.assert_array_equal(np.asarray(found[0])[case.there], np.asarray(expected[0])[case.there])
        jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])

        def loss(*rows):
            outputs, after = case.run(implementation, [*rows, *case.narrow()[3:]])
            return jnp.sum(jnp.where(case.there[..., None, None], outputs, 0)) + jnp.sum(after.values)

        for gradient in jax.jit(jax.grad(loss, range(3)))(*case.narrow()[:3]):
            assert np.isfinite(np.asarray(gradient)[case.there]).all()

    @pytest.mark.parametrize("implementation", ONE_KERNEL)
    def test_two_pieces_are_the_whole(self, implementation):
        case = Case(150, floor=0.0, decay=True)
        outputs, after = case.run(implementation)
        queries, keys, values, *memory = case.narrow()
        first, middle = case.run(implementation, [*(each[:, :70] for each in (queries, keys, values)), *memory])
        second, last = case.run(implementation, [*(each[:, 70:] for each in (queries, keys, values)), *middle])
        assert difference(np.concatenate([first, second], axis=1), np.asarray(outputs)) < TOLERANCE
        for one, other in zip(last, after, strict=True):
            assert difference(one, np.asarray(other)) < TOLERANCE

    @pytest.mark.parametrize("implementation", KERNELS_FIRST)
    def test_half_precision(self, implementation):
        """Bfloat16 in and out; sums are not rounded on the way."""
        case = Case(300, floor=0.0, decay=True)
        arrays = case.narrow(jnp.bfloat16)
        case.queries, case.keys, case.values = (np.asarray(each, np.float64) for each in arrays[:3])
        outputs, after = case.run(implementation, arrays)
        expected = case.expected()
        assert outputs.dtype == jnp.bfloat16
        assert after.values.dtype == after.keys.dtype == jnp.float32
        assert difference(outputs, expected[0]) < 2**-7
        for one, other in zip(after, expected[1:], strict=True):
            assert difference(one, other) < TOLERANCE


def test_float64_stays_float64(x64):
    case = Case(100, floor=0.0, decay=True)
    outputs, after = case.run("xla", case.arrays)
    for one, other in zip((outputs, *after), case.expected(), strict=True):
        assert one.dtype == jnp.float64
        assert difference(one, other) < 1e-12


def test_inputs_that_do_not_fit():
    rows = jnp.zeros((1, 8, 2, 4))
    with pytest.raises(ValueError, match="do not fit each other"):
        linear_attention(rows, rows[:, :7], rows)
    with pytest.raises(ValueError, match="2 query heads are no multiple of 3"):
        linear_attention(rows, jnp.zeros((1, 8, 3, 4)), jnp.zeros((1, 8, 3, 4)))
    with pytest.raises(ValueError, match="give a number for each of 2"):
        linear_attention(rows, rows, rows, decay=jnp.ones(3))
    with pytest.raises(ValueError, match="floor is -1"):
        linear_attention(rows, rows, rows, floor=-1)
    with pytest.raises(UnsupportedError, match="not all float32 or all bfloat16"):
        linear_attention(rows, rows, rows.astype(jnp.float16), implementation="tpu_interpreted")
