"""One test class for every implementation: against loops over a text with a draft tree behind it, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.backends import IMPLEMENTATIONS
from support.cells import cells

from pallas_kernels.augmented_attention import augmented_attention_reference
from pallas_kernels.implementations import UnsupportedError
from pallas_kernels.tree_verify import verify_tree
from pallas_kernels.types import AugmentedState, TreeArrays

TOLERANCE = 2e-6
GROUP, WIDTH = 16, 8


class Case:
    """Rows of different lengths with a random tree behind each, and what is held of them."""

    def __init__(self, nodes, positions, *, heads=4, kv_heads=2, key_size=32, value_size=16, own_trees=False):
        rng = np.random.default_rng(nodes)
        self.positions = positions
        self.parents = [self._tree(nodes, rng) for _ in positions]
        if not own_trees:
            self.parents = [self.parents[0]] * len(positions)
        self.own_trees = own_trees
        self.rows = [
            (
                rng.normal(size=(position + nodes, heads, key_size)),
                rng.normal(size=(position + nodes, kv_heads, key_size)),
                rng.normal(size=(position + nodes, kv_heads, value_size)),
            )
            for position in positions
        ]
        self.alpha, self.taps = rng.normal(size=heads), 0.3 * rng.normal(size=(heads, WIDTH))

    @staticmethod
    def _tree(nodes, rng):
        return [-1, *(int(rng.integers(max(0, node - 4), node)) for node in range(1, nodes))]

    @property
    def tree(self):
        depths, ancestors = [], []
        for parents in self.parents:
            above = np.eye(len(parents), dtype=bool)
            for node, parent in enumerate(parents[1:], 1):
                above[node] |= above[parent]
            ancestors.append(above)
            depths.append(above.sum(axis=1) - 1)
        pair = np.stack(depths), np.stack(ancestors)
        return TreeArrays(*(np.asarray(each if self.own_trees else each[0]) for each in pair))

    def run(self, implementation, dtype=jnp.float32, *, grouped=True, memory=True):
        def unit(rows):
            return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

        sums, keys, values, window = [], [], [], []
        for position, (_, row_keys, row_values) in zip(self.positions, self.rows, strict=True):
            begin = position // GROUP * GROUP
            scored = unit(row_keys)
            sums.append(np.einsum("tkd,tke->kde", scored[:begin], row_values[:begin]))
            # What slots beyond the end hold does not matter.
            missing = begin + GROUP - position
            keys.append(np.concatenate([scored[begin:position], np.full((missing, *scored.shape[1:]), 7.0)]))
            values.append(np.concatenate([row_values[begin:position], np.full((missing, *row_values.shape[1:]), 7.0)]))
            before = np.concatenate([np.zeros((WIDTH, *row_values.shape[1:])), row_values[:position]])
            window.append(before[-(WIDTH - 1) :])
        state: list = [np.stack(each).astype(np.float32) for each in (sums, keys, values, window)]
        state[0] = state[0] if memory else None
        nodes = [
            np.stack([row[part][position:] for position, row in zip(self.positions, self.rows, strict=True)])
            for part in range(3)
        ]

        @jax.jit
        def run(nodes, tree, state, alpha, taps):
            return verify_tree(*nodes, tree, state, alpha=alpha, taps=taps, implementation=implementation)

        return run(
            [each.astype(dtype) for each in nodes],
            self.tree,
            AugmentedState(*state, np.asarray(self.positions)),
            self.alpha.astype(np.float32) if grouped else None,
            self.taps.astype(np.float32),
        )

    def expected(self, grouped=True):
        outputs = []
        for position, parents, row in zip(self.positions, self.parents, self.rows, strict=True):
            behind = [position - 1 if parent < 0 else position + parent for parent in parents]
            parts = [
                augmented_attention_reference(
                    *row, group_size=GROUP, parents=np.array([*range(-1, position - 1), *behind]), **part
                )
                for part in ({"alpha": 1.0, "taps": None, "local": None}, {"alpha": None, "taps": self.taps})
            ]
            outputs.append((grouped * self.alpha[:, None] * parts[0] + parts[1])[position:])
        return np.stack(outputs)


def difference(found, expected):
    return np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestImplementation:
    @pytest.mark.parametrize("nodes", cells([5], [1, 12]))
    def test_nodes_on_rows_of_any_length(self, implementation, nodes):
        case = Case(nodes, [0, 3, 15, 16, 30])
        assert difference(case.run(implementation), case.expected()) < TOLERANCE

    def test_a_tree_for_each_row(self, implementation):
        case = Case(9, [10, 31], own_trees=True)
        assert difference(case.run(implementation), case.expected()) < TOLERANCE

    def test_one_head_for_all_queries(self, implementation):
        case = Case(6, [20], heads=4, kv_heads=1, key_size=64, value_size=64)
        assert difference(case.run(implementation), case.expected()) < TOLERANCE

    def test_without_a_grouped_branch(self, implementation):
        """The state then needs no memory."""
        case = Case(6, [20, 3])
        assert (
            difference(case.run(implementation, grouped=False, memory=False), case.expected(grouped=False)) < TOLERANCE
        )

    def test_half_precision(self, implementation):
        case = Case(6, [20])
        outputs = case.run(implementation, jnp.bfloat16)
        assert outputs.dtype == jnp.bfloat16
        assert difference(outputs, case.expected()) < 2**-6


def test_types_that_do_not_fit():
    with pytest.raises(UnsupportedError, match=r"verify_tree cannot run as 'tpu_interpreted' .*not all float32"):
        Case(2, [3]).run("tpu_interpreted", jnp.float16)


def test_a_grouped_branch_needs_a_memory():
    with pytest.raises(ValueError, match="reads a memory, which the state lacks; give one, or leave alpha out"):
        Case(2, [3]).run("xla", memory=False)
