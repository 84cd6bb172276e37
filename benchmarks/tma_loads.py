"""What the compiler for Hopper makes of loads by pointers and by TMA descriptors: no device is needed.

    python benchmarks/tma_loads.py [--capability 90] [--tiles ROWS,WARPS,STAGES ...]

The loop that a forward pass spends its time in, `sum relu(q·k)^2 v` over the tiles of a window of one head, is compiled
with both. Prints registers, bytes spilled, shared memory, and how many instructions there are, of which kinds.
"""

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lin_jax.errors import OptionParser, UserError, exit_cleanly

SIZE, HEADS, WINDOW = 128, 16, 512
# Products, loads of each kind, address arithmetic, and what goes to the stack.
KINDS = ("HGMMA", "HMMA", "LDG", "LDGSTS", "UTMALDG", "LDS", "LDSM", "STS", "BAR", "IMAD", "IADD3", "LDL", "STL")


@triton.jit
def window_kernel(
    queries,
    keys,
    values,
    length,
    outputs,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    TMA: tl.constexpr,
):
    """Outputs `[T, H, D]` of a tile of one head."""
    begin, head = tl.program_id(0) * TILE, tl.program_id(1)
    asked, inner = begin + tl.arange(0, TILE), tl.arange(0, SIZE)
    stride: tl.constexpr = HEADS * SIZE
    place = asked[:, None] * stride + head * SIZE + inner[None, :]
    there = (asked < length)[:, None]
    query = tl.load(queries + place, mask=there, other=0.0)
    if TMA:
        key_rows = tl.make_tensor_descriptor(keys, [length, stride], [stride, 1], [TILE, SIZE])
        value_rows = tl.make_tensor_descriptor(values, [length, stride], [stride, 1], [TILE, SIZE])
    found = tl.zeros([TILE, SIZE], tl.float32)
    for first in range(tl.maximum(begin - WINDOW, 0), begin + TILE, TILE):
        rows = first + tl.arange(0, TILE)
        if TMA:
            key, value = key_rows.load([first, head * SIZE]), value_rows.load([first, head * SIZE])
        else:
            other = rows[:, None] * stride + head * SIZE + inner[None, :]
            key = tl.load(keys + other, mask=(rows < length)[:, None], other=0.0)
            value = tl.load(values + other, mask=(rows < length)[:, None], other=0.0)
        positive = tl.maximum(tl.dot(query, tl.trans(key)), 0.0)
        weights = tl.where(rows[None, :] <= asked[:, None], positive * positive, 0.0)
        found += tl.dot(weights.to(value.dtype), value)
    tl.store(outputs + place, found.to(query.dtype), mask=there)


def figures(rows: int, warps: int, stages: int, capability: int, *, tma: bool) -> tuple[int, int, int, Counter[str]]:
    """Registers, bytes spilled, bytes of shared memory, and instructions by kind."""
    signature: dict[str, Any] = dict.fromkeys(("queries", "keys", "values"), "*bf16") | {"length": "i32"}
    constants = {"HEADS": HEADS, "SIZE": SIZE, "WINDOW": WINDOW, "TILE": rows, "TMA": tma}
    signature |= {"outputs": "*bf16"} | dict.fromkeys(constants, "constexpr")
    aligned = {(index,): [["tt.divisibility", 16]] for index in (0, 1, 2, 4)}
    source = ASTSource(fn=window_kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        used = printed(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file))
        code = printed(triton.knobs.nvidia.nvdisasm.path, "-c", str(file))
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", code)
    registers, stack = (int(re.search(rf"{word}:(\d+)", used)[1]) for word in ("REG", "STACK"))  # type: ignore[index]
    return registers, stack, compiled.metadata.shared, Counter(found)


def printed(*command: str) -> str:
    """What a tool of the compiler prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Compiles and prints."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, metavar="CC")
    parser.add_argument("--tiles", nargs="+", default=("64,4,2", "64,8,2", "128,8,2"), metavar="ROWS,WARPS,STAGES")
    options = parser.parse_args()
    for text in options.tiles:
        try:
            rows, warps, stages = map(int, text.split(","))
        except ValueError:
            raise UserError(f"the tile '{text}' is not understood; give ROWS,WARPS,STAGES such as 64,4,2") from None
        for tma in (False, True):
            registers, stack, shared, counts = figures(rows, warps, stages, options.capability, tma=tma)
            kinds = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind])
            print(
                f"{rows} rows, {warps} warps, {stages} stages, {'TMA' if tma else 'pointers'}: {registers} registers, "
                f"{stack} bytes spilled, {shared // 1024} KiB shared, {counts.total()} instructions: {kinds}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    exit_cleanly(main)
