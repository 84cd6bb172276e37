"""One test class for every implementation, against tokens that are taken in one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.backends import IMPLEMENTATIONS
from support.cells import cells

from pallas_kernels.implementations import UnsupportedError
from pallas_kernels.path_commit import commit_path
from pallas_kernels.types import AugmentedState, Nodes

GROUP, WINDOW = 16, 7
POSITIONS = [0, 3, 10, 15, 16, 31, 40]
LENGTHS = [0, 5, 6, 1, 3, 6, 6]


class Case:
    """Rows at different positions, and a path of which some tokens are accepted; the others are not numbers."""

    def __init__(self, *, kv_heads=2, key_size=32, value_size=16, dtype=np.float32, window=WINDOW):
        rng = np.random.default_rng(0)
        rows = len(POSITIONS)

        def random(*shape):
            return rng.normal(size=(rows, *shape)).astype(dtype)

        self.memory = rng.normal(size=(rows, kv_heads, key_size, value_size)).astype(np.float32)
        self.keys, self.values = (random(GROUP, kv_heads, size) for size in (key_size, value_size))
        self.window = None if window is None else random(window, kv_heads, value_size)
        self.path = [random(6, kv_heads, size) for size in (key_size, value_size)]
        for part in self.path:
            for row, length in enumerate(LENGTHS):
                part[row, length:] = np.nan

    def run(self, implementation):
        state = AugmentedState(self.memory, self.keys, self.values, self.window, np.asarray(POSITIONS))
        run = jax.jit(lambda *arguments: commit_path(*arguments, implementation=implementation))
        return jax.tree.map(np.asarray, run(state, Nodes(*self.path), np.asarray(LENGTHS)))

    def expected(self):
        """Memory in float64, and what else is held, after one token at a time."""
        memory, keys, values = self.memory.astype(float), self.keys.copy(), self.values.copy()
        window = None if self.window is None else self.window.copy()
        for row, (position, length) in enumerate(zip(POSITIONS, LENGTHS, strict=True)):
            for t in range(length):
                slot = (position + t) % GROUP
                keys[row, slot], values[row, slot] = self.path[0][row, t], self.path[1][row, t]
                if slot == GROUP - 1:
                    group = keys[row].astype(float), values[row].astype(float)
                    memory[row] += np.einsum("gkd,gke->kde", *group)
                if window is not None and window.shape[1]:
                    window[row] = np.concatenate([window[row, 1:], self.path[1][row, t : t + 1]])
        return memory, keys, values, window


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestImplementation:
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    @pytest.mark.parametrize("sizes", cells([(2, 32, 16)], [((4, 64, 64),), ((1, 128, 256),)]))
    def test_rows_anywhere(self, implementation, sizes, dtype):
        heads, key_size, value_size = sizes
        case = Case(kv_heads=heads, key_size=key_size, value_size=value_size, dtype=dtype)
        found = case.run(implementation)
        memory, keys, values, window = case.expected()
        np.testing.assert_allclose(found.memory, memory, rtol=2e-6, atol=2e-5)
        untouched = [row for row, (p, n) in enumerate(zip(POSITIONS, LENGTHS, strict=True)) if p % GROUP + n < GROUP]
        np.testing.assert_array_equal(found.memory[np.array(untouched)], case.memory[untouched])
        np.testing.assert_array_equal(found.window, window)
        np.testing.assert_array_equal(found.position, np.add(POSITIONS, LENGTHS))
        for row, position in enumerate(found.position.tolist()):
            # Slots beyond the end may hold anything.
            used = np.arange(GROUP) < position % GROUP
            np.testing.assert_array_equal(found.keys[row, used], keys[row, used])
            np.testing.assert_array_equal(found.values[row, used], values[row, used])

    def test_where_numbers_are_wide(self, implementation, x64):
        """Positions are then wider than what kernels count with."""
        case = Case()
        found = case.run(implementation)
        np.testing.assert_allclose(found.memory, case.expected()[0], rtol=2e-6, atol=2e-5)
        np.testing.assert_array_equal(found.position, np.add(POSITIONS, LENGTHS))

    @pytest.mark.parametrize("window", [None, 0])
    def test_without_a_convolution(self, implementation, window):
        case = Case(window=window)
        found = case.run(implementation)
        np.testing.assert_allclose(found.memory, case.expected()[0], rtol=2e-6, atol=2e-5)
        assert (found.window is None) == (window is None)


def test_what_cannot_be():
    case = Case()
    case.path = [np.concatenate([part] * 3, axis=1) for part in case.path]
    with pytest.raises(ValueError, match="the path has 18 tokens, a group 16"):
        case.run("xla")
    case = Case(dtype=np.float16)
    with pytest.raises(UnsupportedError, match="the state holds float16"):
        case.run("tpu_interpreted")


def test_a_state_without_a_memory():
    """As local attention keeps it: keys, values and window go on, and there is nothing to fold into."""
    case = Case()
    expected = case.run("xla")
    case.memory = None
    found = case.run(["tpu_interpreted", "xla"])
    assert found.memory is None
    for part in ("keys", "values", "window", "position"):
        np.testing.assert_array_equal(getattr(found, part), getattr(expected, part))
    with pytest.raises(UnsupportedError, match="the state has no memory"):
        case.run("tpu_interpreted")
