"""A train step of a LLaMA of 7 billion parameters, compiled for a TPU pod that need not be there.

    python benchmarks/pod_step.py [--topology v5e:16x16] [--length 2048] [--implementation tpu|xla] [--json FILE]

Needs the package libtpu (`make test` puts it into .venv/libtpu). The compiler is the one of real TPUs: what it says of
memory per chip and of the operations and bytes of a step is what would run. Parameters and moments are cut along all
chips (FSDP), rows lie along them too, activations of a block are recomputed in the backward pass.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

COMPILER = Path(sys.prefix) / "libtpu"
# A process without a TPU must not look for one; the compiler is found beside jax.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
sys.path.append(str(COMPILER))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402
from report import header, write  # noqa: E402

from lin_jax.attention import AttentionConfig  # noqa: E402
from lin_jax.errors import OptionParser, UserError, exit_cleanly  # noqa: E402
from lin_jax.models import LlamaConfig  # noqa: E402
from lin_jax.training.config import OptimizerConfig  # noqa: E402
from lin_jax.training.objectives.language_model import LanguageModel  # noqa: E402
from lin_jax.training.optimizer import build_optimizer  # noqa: E402
from lin_jax.training.step import TrainState, make_step  # noqa: E402
from pallas_kernels.implementations import compiling_for  # noqa: E402


def main() -> int:
    """Compiles, prints, and writes JSON if asked to."""
    options = parse()
    mesh = mesh_of(options.topology)
    chips = mesh.devices.size
    began = time.perf_counter()
    with compiling_for("tpu"), jax.set_mesh(mesh):
        compiled = lowered(options, mesh).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
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
        "bytes_in_between_per_chip": memory.temp_size_in_bytes,
        "operations_per_chip": cost.get("flops"),
        "bytes_accessed_per_chip": cost.get("bytes accessed"),
    }
    print(
        f"{options.topology} ({report['chip']}), {report['batch']} rows of {options.length:,} tokens, attention by "
        f"{options.implementation}: compiled in {report['compile_seconds']:.0f} s with {report['kernels']} kernels\n"
        f"per chip {held / 2**30:.2f} GiB held and {memory.temp_size_in_bytes / 2**30:.2f} GiB in between; "
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


def mesh_of(topology: str) -> Mesh:
    """All chips of a topology, along one axis."""
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as problem:
        raise UserError(f"no chips like '{topology}': {str(problem).splitlines()[0]}; is libtpu installed?") from None
    return Mesh(np.array(devices), ("fsdp",))


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
    objective = LanguageModel(config)
    optimizer = build_optimizer(OptimizerConfig(), 1000)
    state = jax.eval_shape(lambda params: TrainState.new(params, optimizer, jax.random.key(0)), objective.shapes())
    rows = mesh.devices.size * options.rows
    along = NamedSharding(mesh, PartitionSpec("fsdp"))
    part = jax.ShapeDtypeStruct((rows, options.length + 1), jnp.int32, sharding=along)
    batch = {"tokens": part, "documents": part}
    return make_step(objective, optimizer).lower(jax.tree.map(lambda leaf: cut(leaf, mesh), state), {}, batch)


def cut(leaf: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """A shape, cut along the first dimension that the chips divide; layers stay together."""
    count = mesh.devices.size
    names: list[str | None] = [None] * len(leaf.shape)
    along = next((index for index, size in enumerate(leaf.shape) if index and size % count == 0), None)
    if along is not None:
        names[along] = "fsdp"
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*names)))


if __name__ == "__main__":
    exit_cleanly(main)
