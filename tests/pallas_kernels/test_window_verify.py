"""One test class for every implementation: against loops over the text on each node's path, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.backends import FEWER, IMPLEMENTATIONS, KERNELS_FIRST
from support.cells import cells

from pallas_kernels.implementations import UnsupportedError
from pallas_kernels.types import TreeArrays, WindowedState
from pallas_kernels.window_verify import verify_window
from pallas_kernels.windowed_attention import FeatureWeights, windowed_attention_reference

# Of the largest number, for float32 inputs and float32 sums of a few hundred terms.
TOLERANCE = 2e-6
GROUP = 16


class Case:
    """Rows of different lengths with a random tree behind each, and what is held of them."""

    def __init__(
        self,
        nodes,
        positions,
        *,
        heads=4,
        kv_heads=2,
        key_size=16,
        value_size=8,
        features="exponential",
        size=16,
        groups=1,
        tokens=None,
        decay=False,
        own_trees=False,
        sinks=0,
    ):
        rng = np.random.default_rng(nodes)
        self.positions, self.own_trees, self.nodes, self.decay = positions, own_trees, nodes, decay
        self.options = {"features": features, "group_size": GROUP, "groups": groups, "tokens": tokens}
        self.options["scale"] = key_size**-0.5
        self.sinks = sinks
        self.parents = [self._tree(nodes, rng) for _ in positions]
        if not own_trees:
            self.parents = [self.parents[0]] * len(positions)
        self.rows = [
            (
                rng.normal(size=(position + nodes, heads, key_size)),
                rng.normal(size=(position + nodes, kv_heads, key_size)),
                rng.normal(size=(position + nodes, kv_heads, value_size)),
                -rng.uniform(0.0, 0.04, (position + nodes, kv_heads)),
            )
            for position in positions
        ]
        biases = (rng.normal(size=(heads, size)) / 4, rng.normal(size=(kv_heads, size)) / 4)
        self.weights = FeatureWeights(
            rng.normal(size=(heads, size, key_size)) / 2,
            rng.normal(size=(kv_heads, size, key_size)) / 2,
            *(biases if features == "exponential" else (None, None)),
        )
        # Near and far weigh about the same.
        self.balance = rng.normal(size=heads) + (3 if features == "hedgehog" else 0)

    @staticmethod
    def _tree(nodes, rng):
        return [-1, *(int(rng.integers(max(0, node - 3), node)) for node in range(1, nodes))]

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

    def phi(self, keys):
        """Features `[t, K, M]` of keys."""
        raised = np.einsum("tkd,kmd->tkm", keys, self.weights.keys)
        if self.options["features"] == "hedgehog":
            raised = np.exp(np.concatenate([raised, -raised], axis=2))
            return raised / raised.sum(axis=2, keepdims=True)
        scale = self.options["scale"]
        exponents = scale**0.5 * raised + self.weights.key_bias - scale * np.sum(keys**2, axis=2)[..., None] / 2
        return np.exp(exponents) / raised.shape[2] ** 0.5

    def held(self, position, row):
        """The state after `position` tokens: memory, ring (keys, values, decays), sinks; what is free holds sevens."""
        _, keys, values, decays = (part[:position] for part in row)
        tokens, groups = self.options["tokens"], self.options["groups"]
        size = (groups + 1) * GROUP if tokens is None else tokens - 1
        start = position - tokens + 1 if tokens is not None else (position // GROUP - groups) * GROUP
        start = max(start, 0)
        later = np.cumsum(decays[:start][::-1], axis=0)[::-1] - decays[:start]
        ages = np.exp(later) if self.decay else np.ones_like(later)
        ages[: self.sinks] = 0.0
        extended = np.concatenate([values, np.ones_like(values[..., :1])], axis=2)
        memory = np.einsum("tkm,tke,tk->kme", self.phi(keys[:start]), extended[:start], ages)
        ring = [np.full((size, *part.shape[1:]), 7.0) for part in (keys, values, decays)]
        for token in range(start, position):
            for slots, part in zip(ring, (keys, values, decays), strict=True):
                slots[token % size] = part[token]
        for part in (keys, values):
            early = np.full((self.sinks, *part.shape[1:]), 7.0)
            early[:position] = part[: self.sinks]
            ring.append(early)
        return memory, *ring

    def run(self, implementation, dtype=jnp.float32, weights_dtype=jnp.float32):
        held = [self.held(*each) for each in zip(self.positions, self.rows, strict=True)]
        memory, *ring = (np.stack(parts).astype(np.float32) for parts in zip(*held, strict=True))
        keys, values = (part.astype(dtype) for part in ring[:2])
        early = [part.astype(dtype) if self.sinks else None for part in ring[3:]]
        decayed, position = ring[2] if self.decay else None, np.asarray(self.positions, np.int32)
        state = WindowedState(memory, keys, values, decayed, None, position, *early)
        nodes = [np.stack([row[part][-self.nodes :] for row in self.rows]) for part in range(4)]
        *nodes, decays = nodes
        decays = decays.astype(np.float32) if self.decay else None

        @jax.jit
        def run(nodes, weights, tree, state, balance, decays):
            options = self.options | {"balance": balance, "log_decays": decays, "implementation": implementation}
            return verify_window(*nodes, weights, tree, state, **options)

        weights = jax.tree.map(lambda each: each.astype(weights_dtype), self.weights)
        nodes = [each.astype(dtype) for each in nodes]
        return run(nodes, weights, self.tree, state, self.balance.astype(np.float32), decays)

    def expected(self):
        """Each node is the last token of a text of its own."""
        outputs = []
        for position, parents, row in zip(self.positions, self.parents, self.rows, strict=True):
            for node in range(self.nodes):
                path, above = [], node
                while above >= 0:
                    path.insert(0, position + above)
                    above = parents[above]
                text = [*range(position), *path]
                queries, keys, values, decays = (part[text] for part in row)
                found = windowed_attention_reference(
                    queries,
                    keys,
                    values,
                    self.weights,
                    balance=self.balance,
                    log_decays=decays if self.decay else None,
                    sinks=self.sinks,
                    **self.options,
                )
                outputs.append(found[-1])
        return np.stack(outputs).reshape(len(self.positions), self.nodes, *outputs[0].shape)


def difference(found, expected):
    return np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()


class TestImplementation:
    @pytest.mark.parametrize("implementation", KERNELS_FIRST)
    def test_windows_of_groups(self, implementation):
        """Rows anywhere: nothing yet, within the first window, and with paths that leave the window."""
        case = Case(9, [0, 31, 45], decay=True)
        assert difference(case.run(implementation), case.expected()) < TOLERANCE

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_a_sliding_window_that_paths_leave(self, implementation):
        """Deep nodes no longer see the first ones, which count by features, then."""
        case = Case(12, [2, 30], features="hedgehog", tokens=4, own_trees=True)
        assert np.max(np.asarray(case.tree.depth)) > 4
        assert difference(case.run(implementation), case.expected()) < TOLERANCE

    @pytest.mark.parametrize("implementation", KERNELS_FIRST)
    @pytest.mark.parametrize("window", cells([{"tokens": 5, "decay": True}], [{"features": "hedgehog", "groups": 0}]))
    def test_sinks(self, implementation, window):
        """They are near for ever, and never in the memory: before there are any, among the nodes, and long gone."""
        case = Case(9, [0, 2, 41], sinks=3, **window)
        assert difference(case.run(implementation), case.expected()) < TOLERANCE

    @pytest.mark.parametrize("implementation", cells([], IMPLEMENTATIONS))
    @pytest.mark.parametrize("nodes", [1, 17])
    @pytest.mark.parametrize(
        "sizes",
        [
            {"heads": 4, "kv_heads": 1, "key_size": 32, "value_size": 32, "size": 64, "groups": 2},
            {"heads": 2, "kv_heads": 2, "size": 24, "features": "hedgehog", "decay": True, "groups": 0},
            {"heads": 3, "kv_heads": 3, "key_size": 24, "value_size": 40, "size": 20, "tokens": 20, "decay": True},
            {"heads": 2, "kv_heads": 1, "key_size": 128, "value_size": 128, "size": 160, "tokens": 9, "sinks": 2},
        ],
    )
    def test_sizes(self, implementation, nodes, sizes):
        case = Case(nodes, [20, 47], **sizes)
        assert difference(case.run(implementation), case.expected()) < TOLERANCE

    @pytest.mark.parametrize("implementation", FEWER)
    @pytest.mark.parametrize("weights_dtype", cells([jnp.float32], [jnp.bfloat16]))
    def test_half_precision(self, implementation, weights_dtype):
        case = Case(6, [20, 47], features="hedgehog")
        outputs = case.run(implementation, jnp.bfloat16, weights_dtype)
        assert outputs.dtype == jnp.bfloat16
        assert difference(outputs, case.expected()) < 2**-6


def test_what_cannot_be():
    with pytest.raises(UnsupportedError, match=r"verify_window cannot run as 'tpu_interpreted' .*not all float32"):
        Case(2, [3]).run("tpu_interpreted", jnp.float16)
    with pytest.raises(UnsupportedError, match="the window holds no token before a node"):
        Case(2, [3], tokens=1).run("tpu_interpreted")
    case = Case(2, [3])
    case.phi = lambda keys: np.zeros((*keys.shape[:2], 12))
    with pytest.raises(ValueError, match=r"the memory has \(12, 9\) numbers a head; give \(16, 9\)"):
        case.run("xla")
