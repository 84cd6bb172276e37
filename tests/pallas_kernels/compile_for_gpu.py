"""Compiles the Triton kernels for GPUs that need not be there, in a process of its own: `compile_for_gpu.py SM..`.

Prints a line for each kernel: registers, spilled bytes, shared memory.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pallas_kernels import gpu_launch
from pallas_kernels.augmented_attention import Placement, Start, gpu
from pallas_kernels.augmented_attention.problem import Problem

# Rows, tokens, query heads, key/value heads, sizes of keys and values, type, with documents and a start.
CASES = [
    (1, 8192, 8, 8, 128, 128, jnp.bfloat16, False),
    (2, 1000, 8, 4, 64, 64, jnp.bfloat16, True),
    (1, 500, 2, 2, 256, 256, jnp.bfloat16, False),
    (1, 500, 2, 2, 256, 256, jnp.bfloat16, True),
    (1, 500, 4, 2, 128, 128, jnp.bfloat16, True),
    (1, 63, 4, 4, 64, 64, jnp.float32, False),
    (1, 65, 4, 1, 32, 32, jnp.float32, True),
    (1, 65, 4, 4, 128, 128, jnp.float32, True),
    (1, 65, 4, 4, 256, 256, jnp.float32, False),
]
NAMES = {
    "bfloat16": "*bf16",
    "float32": "*fp32",
    "int32": "*i32",
    "bool": "*i1",
}


class Launches:
    """Takes the place of `launch`: notes what would be compiled."""

    def __init__(self):
        self.seen = {}

    def __call__(self, kernel, arguments, outputs, *, grid, constants, warps, stages, interpret, aliases=None):
        signature = {}
        for name, each in zip(kernel.arg_names, [*arguments, *outputs], strict=False):
            signature[name] = "i32" if isinstance(each, int) else NAMES[each.dtype.name]
        signature |= dict.fromkeys(constants, "constexpr")
        assert set(signature) == set(kernel.arg_names), set(kernel.arg_names) ^ set(signature)
        pointers = [index for index, kind in enumerate(signature.values()) if kind.startswith("*")]
        key = (kernel.fn.__name__, tuple(signature.items()), tuple(constants.items()), warps, stages)
        self.seen[key] = (kernel, signature, constants, pointers, warps, stages)
        return [jnp.zeros(each.shape, each.dtype) for each in outputs]


def trace(launches):
    """Goes through all operations' launches without running anything."""
    for rows, tokens, heads, kv_heads, key_size, value_size, dtype, placed in CASES:
        struct = jax.ShapeDtypeStruct
        queries, keys, values = (
            struct((rows, tokens, *tail), dtype)
            for tail in ((heads, key_size), (kv_heads, key_size), (kv_heads, value_size))
        )
        placement = start = None
        if placed:
            whole, row = struct((rows, tokens), jnp.int32), struct((rows,), jnp.int32)
            placement = Placement(whole, whole, row, row, row)
            start = Start(
                struct((rows, kv_heads, key_size, value_size), jnp.float32),
                struct((rows, 64, kv_heads, key_size), dtype),
                struct((rows, 64, kv_heads, value_size), dtype),
                struct((rows, 64), jnp.int32),
                struct((rows, 64), bool),
            )
        alpha, taps = struct((heads,), jnp.float32), struct((heads, 32), jnp.float32)
        problem = Problem(queries, keys, values, alpha, taps, placement, start)
        plan = gpu.plan_for(problem, group=64, unit=True, local=True)

        def both(problem, plan=plan):
            problem = problem if problem.start is None else problem._replace(start=problem.start.of_length(plan.before))
            result = gpu.forward(problem, plan, differentiated=True)
            return gpu.backward(problem, plan, result.before, result.outputs, result.after)

        with mock.patch.object(gpu, "launch", launches):
            jax.eval_shape(both, problem)


def report(kernel, signature, constants, pointers, warps, stages, capability):
    """Compiles a kernel and reads off its machine code what it needs; what is spilled lies on the stack."""
    attributes = {(index,): [["tt.divisibility", 16]] for index in pointers}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", said)[1]) for word in ("REG", "STACK"))
    return registers, stack, compiled.metadata.shared


def main(capabilities):
    """Compiles everything."""
    # Kernels must be imported before Triton could be told to interpret.
    gpu_launch.kernels_of(gpu.KERNELS, False)
    launches = Launches()
    trace(launches)
    for capability in capabilities:
        for kernel, signature, constants, pointers, warps, stages in launches.seen.values():
            registers, stack, shared = report(kernel, signature, constants, pointers, warps, stages, capability)
            kinds = sorted({kind for kind in signature.values() if kind in ("*bf16",)}) or ["*fp32"]
            tags = "".join(name[0] for name in ("PLACED", "STARTED", "WEIGHTS", "REVERSE") if constants.get(name))
            print(
                f"sm_{capability} {kernel.fn.__name__} {kinds[0][1:]} {constants['D']}x{constants['E']} {tags or '-'}: "
                f"{registers} registers, {stack} bytes spilled, {shared} bytes shared",
                flush=True,
            )


if __name__ == "__main__":
    main([int(each) for each in sys.argv[1:]] or [80, 90])
