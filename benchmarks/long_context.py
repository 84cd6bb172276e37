"""A train step of a LLaMA on one row of a million tokens, which lies along all chips of a TPU slice.

    python benchmarks/long_context.py [--topology v5e:16x16] [--size 7b] [--length 1048576] [--json FILE]

The slice need not be there: the compiler of real TPUs says what a chip would hold. Every chip has a piece of the row
and of the parameters and moments (FSDP); activations of a block are recomputed in the backward pass. Batches are packed
documents, as in every training run.
"""

import argparse
import re
import time
from typing import Any

from tpu_compiler import bytes_per_chip, lowered_step, mesh_of  # isort: skip

import jax
from jax.sharding import Mesh
from report import header, write

from lin_jax.attention import AttentionConfig
from lin_jax.errors import OptionParser, UserError, exit_cleanly
from lin_jax.models import LlamaConfig
from pallas_kernels.implementations import compiling_for

# Of a chip, as sold: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm
GIGABYTES = {"TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32}
SIZES: dict[str, dict[str, int]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_layers": 22, "num_heads": 32, "num_kv_heads": 4},
    "7b": {"hidden_size": 4096, "intermediate_size": 11_008, "num_layers": 32, "num_heads": 32},
}


def main() -> int:
    """Compiles, prints, and writes JSON if asked to; 1 if a chip cannot hold it."""
    options = parse()
    mesh = mesh_of(options.topology, "sequence")
    kind = mesh.devices.flat[0].device_kind
    began = time.perf_counter()
    with compiling_for("tpu"), jax.set_mesh(mesh):
        program = lowered(options, mesh)
        try:
            compiled = program.compile()
        except jax.errors.JaxRuntimeError as problem:
            print(f"{options.topology} ({kind}) cannot hold it: {short(str(problem))}")
            return 1
    held, between = bytes_per_chip(compiled)
    report: dict[str, Any] = {
        **header("long context"),
        "topology": options.topology,
        "chip": kind,
        "chips": mesh.devices.size,
        "size": options.size,
        "attention": options.attention,
        "length": options.length,
        "vocabulary": options.vocabulary,
        "compile_seconds": time.perf_counter() - began,
        "kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
        "bytes_held_per_chip": held,
        "bytes_in_between_per_chip": between,
        "operations_per_chip": compiled.cost_analysis().get("flops"),
    }
    print(
        f"LLaMA {options.size}, {options.attention}, one row of {options.length:,} tokens on {options.topology} "
        f"({kind}): {options.length // mesh.devices.size:,} tokens a chip; compiled in "
        f"{report['compile_seconds']:.0f} s with {report['kernels']} kernels\n"
        f"per chip {held / 1e9:.2f} GB held and {between / 1e9:.2f} GB in between, "
        f"of {GIGABYTES.get(kind, '?')} GB"
    )
    if options.json is not None:
        write(report, options.json)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:16x16", help="such as v5e:4x4, v6e:8x8, v5p:4x4x4")
    parser.add_argument("--size", choices=tuple(SIZES), default="7b", help="of the model")
    parser.add_argument("--layers", type=int, metavar="N", help="fewer compile no faster, but need less")
    parser.add_argument("--length", type=int, default=2**20, metavar="T", help="tokens of the row")
    parser.add_argument("--vocabulary", type=int, default=32_000, metavar="N", help="entries")
    parser.add_argument("--attention", default="augmented", metavar="NAME", help="of the registry")
    parser.add_argument("--implementation", choices=("tpu", "xla"), help="of attention; by default what suits")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to a file, or print it")
    options = parser.parse_args()
    if options.length < 1:
        raise UserError(f"--length is {options.length}; give a positive number")
    return options


def lowered(options: argparse.Namespace, mesh: Mesh) -> Any:
    """The step of the package's own training loop, on arrays that are shapes only."""
    sizes = SIZES[options.size] | ({} if options.layers is None else {"num_layers": options.layers})
    attention = AttentionConfig(options.attention, 64, 63, implementation=options.implementation)
    config = LlamaConfig(vocab_size=options.vocabulary, **sizes, attention=attention, dtype="bfloat16", remat=True)
    return lowered_step(config, mesh, 1, options.length)


def short(problem: str) -> str:
    """What the compiler says of memory, in one line."""
    found = re.search(r"Ran out of memory[^\n]*|Used [^\n]*", problem)
    return found[0] if found else problem.splitlines()[0]


if __name__ == "__main__":
    exit_cleanly(main)
