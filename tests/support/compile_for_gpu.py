"""Compiles the Triton kernels for GPUs that need not be there, in a process of its own.

    python tests/support/compile_for_gpu.py [--capabilities 80 90] [--all] [--tiles FILE]

Prints a line for each kernel: registers, bytes spilled to the stack, shared memory. `--all` compiles every row of the
shipped table; without it, a few. `--tiles` takes another table.
"""

import argparse
import re
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import pallas_kernels.augmented_attention.gpu
import pallas_kernels.linear_attention.gpu
import pallas_kernels.path_commit.gpu
import pallas_kernels.tree_verify.gpu
import pallas_kernels.window_verify.gpu
import pallas_kernels.windowed_attention.gpu
from pallas_kernels.augmented_attention import problem as augmented
from pallas_kernels.gpu import launch as gpu_launch
from pallas_kernels.gpu import memories as gpu_memories
from pallas_kernels.linear_attention import problem as linear
from pallas_kernels.tiles import SIZES, untiled, use_table
from pallas_kernels.tree_verify import problem as trees
from pallas_kernels.types import AugmentedState, Nodes, TreeArrays, WindowedState
from pallas_kernels.window_verify import problem as windows
from pallas_kernels.windowed_attention import problem as windowed

MODULES = {
    "augmented_attention": pallas_kernels.augmented_attention.gpu,
    "linear_attention": pallas_kernels.linear_attention.gpu,
    "windowed_attention": pallas_kernels.windowed_attention.gpu,
    "tree_verify": pallas_kernels.tree_verify.gpu,
    "window_verify": pallas_kernels.window_verify.gpu,
    "path_commit": pallas_kernels.path_commit.gpu,
}
# Size of heads, type, and whether rows hold several documents and go on from a state.
FEW = [(128, jnp.bfloat16, False), (64, jnp.bfloat16, True), (32, jnp.float32, True)]
ALL = [
    (size, dtype, placed)
    for size in SIZES
    for dtype in (jnp.bfloat16, jnp.float32)
    for placed in (False, True)
    if untiled("augmented_attention.outputs", size, size, dtype) is None
]
NAMES = {"bfloat16": "*bf16", "float32": "*fp32", "int32": "*i32"}
ROWS, TOKENS, HEADS, KV_HEADS, NODES, GROUP, TAPS, SINKS = 2, 500, 4, 2, 26, 64, 32, 4


class Launches:
    """Takes the place of `launch`: notes what would be compiled."""

    def __init__(self):
        self.seen = {}

    def __call__(self, kernel, arguments, outputs, *, grid, constants, warps, stages, interpret, aliases=None):
        changed = dict(aliases or {}).values()
        arrays = [*arguments, *(each for index, each in enumerate(outputs) if index not in changed)]
        names = kernel.arg_names[: len(arrays)]
        signature = {
            name: "i32" if isinstance(each, int) else NAMES[each.dtype.name]
            for name, each in zip(names, arrays, strict=True)
        }
        signature |= dict.fromkeys(constants, "constexpr")
        assert set(signature) == set(kernel.arg_names), set(kernel.arg_names) ^ set(signature)
        key = (kernel.fn.__name__, *signature.items(), *constants.items(), warps, stages)
        self.seen[key] = (kernel, signature, constants, warps, stages)
        return [jnp.zeros(each.shape, each.dtype) for each in outputs]


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def rows_of(size, dtype, tokens):
    """Queries, keys and values."""
    return [struct(ROWS, tokens, heads, size, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def both_passes(module, problem, plan):
    """Forward and backward."""

    def run(problem):
        if getattr(plan, "before", None) is not None and problem.prior is not None:
            problem = problem._replace(prior=problem.prior.of_length(plan.before))
        result = module.forward(problem, plan, differentiated=True)
        kept = result if module is MODULES["linear_attention"] else result.before
        return module.backward(problem, plan, kept, result.outputs, result.after)

    jax.eval_shape(run, problem)


def trace(launches, size, dtype, placed):
    """Goes through all operations without running anything."""
    memory = struct(ROWS, KV_HEADS, size, size)
    whole, row = struct(ROWS, TOKENS, dtype=jnp.int32), struct(ROWS, dtype=jnp.int32)
    held = [struct(ROWS, GROUP, KV_HEADS, size, dtype=dtype) for _ in range(2)]
    alpha, taps = struct(HEADS), struct(HEADS, TAPS)
    packed = augmented.PackedRows(whole, whole, row, row, row) if placed else None
    slots = struct(ROWS, GROUP, dtype=jnp.int32), struct(ROWS, GROUP, dtype=bool)
    prior = augmented.PriorContext(memory, *held, *slots) if placed else None
    with ExitStack() as stack:
        for module in (*MODULES.values(), gpu_memories):
            stack.enter_context(mock.patch.object(module, "launch", launches, create=True))
        rows = rows_of(size, dtype, TOKENS)
        problem = augmented.AugmentedProblem(*rows, alpha, taps, packed, prior)
        module = MODULES["augmented_attention"]
        both_passes(module, problem, module.plan_for(problem, group=GROUP, unit=True, local=True))
        module = MODULES["linear_attention"]
        memories = linear.Memory(memory, struct(ROWS, KV_HEADS, size))
        problem = linear.LinearProblem(*rows, struct(KV_HEADS) if placed else None, whole if placed else None, memories)
        both_passes(module, problem, module.plan_for(problem, 0.0 if placed else None))
        module = MODULES["windowed_attention"]
        problem = windowed_problem(rows, held, size, packed, slots[0])
        window = windowed.AttentionWindowPlan(None, GROUP, 1, size**-0.5, "exponential", SINKS if placed else 0)
        both_passes(module, problem, module.plan_for(problem, window))
        tree = TreeArrays(struct(NODES, dtype=jnp.int32), struct(NODES, NODES, dtype=bool))
        state = AugmentedState(memory, *held, struct(ROWS, TAPS - 1, KV_HEADS, size, dtype=dtype), row)
        nodes = rows_of(size, dtype, NODES)
        verified = trees.VerifyProblem(*nodes, alpha, taps, tree, state)
        jax.eval_shape(lambda problem: MODULES["tree_verify"].verify(problem, unit_inputs=True, local=True), verified)
        jax.eval_shape(MODULES["path_commit"].commit, state, Nodes(*nodes[1:]), row)
        name = "hedgehog" if placed else "exponential"
        window = windowed.AttentionWindowPlan(None, GROUP, 1, size**-0.5, name)
        verified = verified_window(nodes, tree, size, dtype, decayed=placed, hedgehog=placed)
        jax.eval_shape(lambda problem: MODULES["window_verify"].verify(problem, window), verified)


def verified_window(nodes, tree, size, dtype, *, decayed, hedgehog):
    """A tree by a window of two groups and a memory, with the number of features that models have."""
    directions = size if hedgehog else min(2 * size, 256)
    features = 2 * size if hedgehog else directions
    biases = (None, None) if hedgehog else (struct(HEADS, directions), struct(KV_HEADS, directions))
    weights = windowed.FeatureWeights(struct(HEADS, directions, size), struct(KV_HEADS, directions, size), *biases)
    ring = [struct(ROWS, 2 * GROUP, KV_HEADS, size, dtype=dtype) for _ in range(2)]
    held, decays = (struct(ROWS, 2 * GROUP, KV_HEADS), struct(ROWS, NODES, KV_HEADS)) if decayed else (None, None)
    memory = struct(ROWS, KV_HEADS, features, size + 1)
    state = WindowedState(memory, *ring, held, None, struct(ROWS, dtype=jnp.int32))
    return windows.WindowVerifyProblem(*nodes, weights, struct(HEADS), decays, tree, state)


def windowed_problem(rows, held, size, packed, slots):
    """Attention over a window and a memory, with the features that models have; placed rows decay, and have sinks."""
    features = min(2 * size, 256)
    weights = windowed.FeatureWeights(
        struct(HEADS, features, size),
        struct(KV_HEADS, features, size),
        struct(HEADS, features),
        struct(KV_HEADS, features),
    )
    decays = prior = None
    if packed is not None:
        shape = ROWS, KV_HEADS, features
        decays, kept = struct(ROWS, TOKENS, KV_HEADS), struct(ROWS, GROUP, KV_HEADS)
        prior = windowed.WindowedPrior(linear.Memory(struct(*shape, size), struct(*shape)), *held, kept, slots)
    return windowed.WindowedProblem(*rows, weights, struct(HEADS), decays, packed, prior)


def report(kernel, signature, constants, warps, stages, capability):
    """Compiles a kernel and reads off its machine code what it needs; what is spilled lies on the stack."""
    pointers = [index for index, kind in enumerate(signature.values()) if kind.startswith("*")]
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


def main():
    """Compiles everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", nargs="+", type=int, default=[80, 90], metavar="CC")
    parser.add_argument("--all", action="store_true", help="every row of the table")
    parser.add_argument("--operations", nargs="+", choices=(*MODULES, "gpu"), help="only their own kernels")
    parser.add_argument("--tiles", type=Path, metavar="FILE", help="another table of tiles")
    options = parser.parse_args()
    if options.tiles is not None:
        use_table(options.tiles)
    for module in MODULES.values():
        gpu_launch.kernels_of(module.KERNELS, False)
    for size, dtype, placed in ALL if options.all else FEW:
        launches = Launches()
        trace(launches, size, dtype, placed)
        for kernel, *compiled in launches.seen.values():
            module = kernel.fn.__module__.split(".")[1]
            if options.operations is not None and module not in options.operations:
                continue
            for capability in options.capabilities:
                registers, stack, shared = report(kernel, *compiled, capability)
                print(
                    f"sm_{capability} {module} {kernel.fn.__name__} {jnp.dtype(dtype).name} {size}"
                    f"{' placed' if placed else ''}: "
                    f"{registers} registers, {stack} bytes spilled, {shared} bytes shared",
                    flush=True,
                )


if __name__ == "__main__":
    main()
