"""A train step of a LLaMA of 7 billion parameters, compiled for a TPU pod that need not be there.

    python benchmarks/pod_step.py [--topology v5e:16x16] [--length 2048] [--implementation tpu|xla] [--json FILE]

Needs the package libtpu (`make test` puts it into .venv/libtpu). The compiler is the one of real TPUs: what it says of
memory per chip and of the operations and bytes of a step is what would run. Parameters and moments are cut along all
chips (FSDP), rows lie along them too, activations of a block are recomputed in the backward pass.
"""

import argparse
import time
from typing import Any

from tpu_compiler import bytes_per_chip, lowered_step, mesh_of  # isort: skip

import jax
from jax.sharding import Mesh
from report import header, write

from lin_jax.attention import AttentionConfig
from lin_jax.errors import OptionParser, exit_cleanly
from lin_jax.models import LlamaConfig
from pallas_kernels.implementations import compiling_for


def main() -> int:
    """Compiles, prints, and writes JSON if asked to."""
    options = parse()
    mesh = mesh_of(options.topology, "fsdp")
    chips = mesh.devices.size
    began = time.perf_counter()
    with compiling_for("tpu"), jax.set_mesh(mesh):
        compiled = lowered(options, mesh).compile()
    (held, between), cost = bytes_per_chip(compiled), compiled.cost_analysis()
    report: dict[str, Any] = {
        **header("pod step"),
        "topology": options.topology,
        "chip": mesh.devices.flat[0].device_kind,
        "chips": int(chips),
        "batch": chips * options.rows,
        "length": options.length,
        "implementation": options.implementation,
        "compile_seconds": time.perf_counter() - began,
        "kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
        "bytes_held_per_chip": held,
        "bytes_in_between_per_chip": between,
        "operations_per_chip": cost.get("flops"),
        "bytes_accessed_per_chip": cost.get("bytes accessed"),
    }
    print(
        f"{options.topology} ({report['chip']}), {report['batch']} rows of {options.length:,} tokens, attention by "
        f"{options.implementation}: compiled in {report['compile_seconds']:.0f} s with {report['kernels']} kernels\n"
        f"per chip {held / 2**30:.2f} GiB held and {between / 2**30:.2f} GiB in between; "
        f"{cost.get('flops', 0) / 1e12:,.1f} TFLOP and {cost.get('bytes accessed', 0) / 1e9:,.1f} GB accessed a step, "
        "kernels not counted"
    )
    if options.json is not None:
        write(report, options.json)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:16x16", help="such as v5e:4x4, v6e:8x8, v5p:4x4x4")
    parser.add_argument("--length", type=int, default=2048, metavar="T", help="tokens of a row")
    parser.add_argument("--rows", type=int, default=1, metavar="N", help="of each chip")
    parser.add_argument("--layers", type=int, default=32, metavar="N", help="fewer compile no faster, but need less")
    parser.add_argument("--implementation", choices=("tpu", "xla"), default="tpu", help="of attention")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to a file, or print it")
    return parser.parse_args()


def lowered(options: argparse.Namespace, mesh: Mesh) -> Any:
    """The step of the package's own training loop, on arrays that are shapes only."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=11_008,
        num_layers=options.layers,
        num_heads=32,
        attention=AttentionConfig("augmented", 64, 63, implementation=options.implementation),
        dtype="bfloat16",
        remat=True,
    )
    return lowered_step(config, mesh, mesh.devices.size * options.rows, options.length)


if __name__ == "__main__":
    exit_cleanly(main)
