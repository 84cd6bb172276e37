"""Mixers on a mesh whose axis `sequence` has four devices; prints each case's largest difference from one device.

`over_a_sequence.py further` takes further cases instead.

Differences are of outputs and of gradients in queries, keys, values and parameters, relative to the largest number.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support.oracle import Oracle

from lin_jax.attention import (
    QKV,
    AttentionConfig,
    Conventions,
    Layout,
    RelativeBias,
    build_mixer,
    masked_rows,
    packed_rows,
    whole_rows,
)

ROWS, TOKENS, HEADS, KV_HEADS, SIZE = 2, 48, 4, 2, 4
# In pieces of 12: a document over four of them, one that begins with a piece, one that ends with it, and padding.
DOCUMENTS = np.stack([np.repeat([1, 2, 3], [5, 36, 7]), np.repeat([0, 4, 5, 6, 7, 0], [2, 10, 18, 1, 13, 4])])
PRESENT = np.ones((ROWS, TOKENS), int)
PRESENT[0, [0, 1, 20]] = PRESENT[1, 40:] = 0
FLASH = Conventions(unit=False, separate=True, inverse_group=True, bias="scores", factor=False)
T5 = Conventions(unit_values=True, merged_norm=True)


@dataclass
class Case:
    """A mixer, rows for it, and how many devices share their heads; others share the rows."""

    name: str
    rows: str = "packed"
    tensor: int = 1
    group_size: int = 5
    kernel_size: int = 13
    form: str = "causal"
    conventions: Conventions = field(default_factory=Conventions)
    biased: bool = False
    dtype: Any = jnp.float64
    implementation: str | None = None
    tokens: int = TOKENS

    @cached_property
    def config(self) -> AttentionConfig:
        sizes = {"initial_alpha": 0.7, "features": 8, "rank": 2, "implementation": self.implementation}
        return AttentionConfig(self.name, self.group_size, self.kernel_size, **sizes)

    @cached_property
    def mixer(self) -> Any:
        mixer = build_mixer(
            self.config,
            form=self.form,
            heads=HEADS,
            kv_heads=KV_HEADS,
            head_dim=SIZE,
            conventions=self.conventions,
            layer=1,
            param_dtype=self.dtype,
            rngs=nnx.Rngs(0),
        )
        for seed, (_, parameter) in enumerate(nnx.to_flat_state(nnx.state(mixer, nnx.Param))):
            parameter[...] = parameter[...] + self.random(seed, *parameter.shape) / 2
        return mixer

    def random(self, seed: int, *shape: int) -> jax.Array:
        return jnp.asarray(np.random.default_rng(seed).normal(size=shape), self.dtype)

    @cached_property
    def inputs(self) -> list[jax.Array]:
        """Queries, keys and values."""
        return [self.random(10 + h, ROWS, self.tokens, h, SIZE) for h in (HEADS, KV_HEADS, KV_HEADS)]

    @property
    def layout(self) -> Layout:
        if self.rows == "packed":
            return packed_rows(jnp.asarray(DOCUMENTS, jnp.int32))
        return masked_rows(jnp.asarray(PRESENT)) if self.rows == "masked" else whole_rows(ROWS, self.tokens)

    @property
    def program(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Outputs and gradients, and what they are functions of."""
        graph, parameters, fixed = nnx.split(self.mixer, nnx.Param, ...)
        both = self.form == "bidirectional"

        def outputs(parameters: Any, table: Any, *inputs: jax.Array) -> jax.Array:
            mixer, layout, qkv = nnx.merge(graph, parameters, fixed), self.layout, QKV(*inputs)
            bias = None if table is None else RelativeBias(table, both, 20)
            if both:
                return mixer.bidirectional(qkv, layout, bias)
            found = mixer.parallel(qkv, layout, None, bias)[0]
            return jnp.where((layout.segment_ids > 0)[..., None, None], found, 0)

        def program(cotangent: jax.Array, *arguments: Any) -> Any:
            found, pull = jax.vjp(outputs, *arguments)
            return found, pull(cotangent)

        table = self.random(1, 8, HEADS) if self.biased else None
        return program, (self.random(2, *self.inputs[0].shape), parameters, table, *self.inputs)

    def alone(self) -> Any:
        program, arguments = self.program
        return jax.jit(program)(*arguments)

    def cut(self) -> tuple[Any, Any]:
        """The same on the mesh, compiled, and what it gives."""
        program, arguments = self.program
        mesh = Mesh(
            np.array(jax.devices()).reshape(2 // self.tensor, 1, self.tensor, 4), ("data", "fsdp", "tensor", "sequence")
        )
        here = NamedSharding(mesh, PartitionSpec("data", "sequence", "tensor"))
        with jax.set_mesh(mesh):
            placed = jax.tree.map(lambda each: jax.device_put(each, here) if each.ndim == 4 else each, arguments)
            compiled = jax.jit(program).lower(*placed).compile()
            return compiled, compiled(*placed)


CASES = (
    Case("augmented"),
    Case("augmented", "whole", tensor=2),
    Case("augmented", "masked", form="bidirectional"),
)
FURTHER = (
    Case("transnormer+local+convolution"),
    Case("linformer", tensor=2),
    Case("augmented", "masked", group_size=4),
    Case("flash_global", group_size=12),
    Case("flash+convolution", group_size=3, conventions=FLASH, biased=True, tensor=2),
    Case("performer+local+convolution", kernel_size=25),
    Case("rfa", tensor=2),
    Case("softmax+local+convolution", "whole", group_size=4),
    Case("flash_local", tensor=2),
    Case("flash", "whole", group_size=1, tensor=2),
    Case("flash_global+local", conventions=T5, biased=True, tensor=2),
    Case("performer", "whole", group_size=6, tensor=2),
    Case("relu", "whole", group_size=7),
    Case("linear_angular+convolution", group_size=7),
    Case("yoso+convolution", tensor=2),
    Case("square"),
    Case("performer", "masked", form="bidirectional", tensor=2),
)
KERNELS = Case("augmented", tensor=2, dtype=jnp.float32, implementation="tpu_interpreted")


def difference(found: Any, expected: Any) -> float:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(one - other).max() / np.abs(other).max()) for one, other in pairs)


def from_the_oracle(case: Case, outputs: jax.Array) -> float:
    """The largest difference from documents alone, one query at a time."""
    oracle, worst = Oracle(case.config, case.mixer, 1), 0.0
    for row, segment_ids in enumerate(DOCUMENTS):
        for number in set(segment_ids.tolist()) - {0}:
            here = segment_ids == number
            expected = oracle.causal(*(np.asarray(each[row][here]) for each in case.inputs))
            worst = max(worst, difference(outputs[row][here], expected))
    return worst


def bytes_sent(compiled: Any) -> int:
    """What all operations in which devices meet give, forward and backward."""
    kinds = "all-to-all|collective-permute|all-gather|all-reduce|reduce-scatter"
    total = 0
    for result in re.findall(rf"= (.*?) (?:{kinds})(?:-start)?\(", compiled.as_text()):
        for bits, sizes in re.findall(r"[a-z]+(\d+)\[([\d,]*)\]", result):
            total += int(bits) // 8 * int(np.prod([int(size) for size in sizes.split(",") if size]))
    return total


def show(case: Case) -> tuple[Any, Any]:
    compiled, found = case.cut()
    print(case.name, case.rows, case.form, difference(found, case.alone()))
    return compiled, found


def main(further: bool) -> None:
    """One set of cases; the first also has an oracle, what devices send each other, and kernels in float32."""
    if further:
        for case in FURTHER:
            show(case)
        return
    for case in CASES:
        compiled, found = show(case)
        if case.name == "augmented" and case.rows == "packed":
            print("oracle", from_the_oracle(case, found[0]))
        if case.name == "augmented" and case.rows == "whole":
            longer = replace(case, tokens=4 * TOKENS)
            sent = bytes_sent(compiled), bytes_sent(longer.cut()[0])
    print("float32", difference(KERNELS.cut()[1], replace(KERNELS, implementation=None).alone()))
    print("bytes", *sent)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main(sys.argv[1:] == ["further"])
