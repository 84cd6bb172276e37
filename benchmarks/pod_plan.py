"""Plans for pods: training steps compiled for TPU slices that need not be there, and the memory that each chip needs.

    python benchmarks/pod_plan.py [--plans NAME ...] [--topologies v5e:16x16 ...] [--json FILE]
    python benchmarks/pod_plan.py --plans llama2-7b-full --topologies v5e:4x4

A plan is a model, what of it learns, and how it lies on a mesh; the step is the training loop's own, with the kernels
for TPU inside. Needs the package libtpu (`make test` puts it into .venv/libtpu): its compiler is that of real TPUs, and
what it says of memory is what would be used. A program that does not fit is refused by the compiler, and shown so.
"""

import argparse
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lib.tpu_compiler import chips_of  # isort: skip

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from lib.report import header, write
from tqdm import tqdm

from lin_jax.attention import AttentionConfig
from lin_jax.errors import OptionParser, UserError, exit_cleanly
from lin_jax.models import FlashConfig, LlamaConfig
from lin_jax.models.adapters import AdapterConfig
from lin_jax.models.params import abstract_model, filled, params_of
from lin_jax.models.registry import family_of_config
from lin_jax.training.config import OptimizerConfig, RunConfig, TrainingConfig
from lin_jax.training.distributed.mesh import MeshConfig, make_mesh
from lin_jax.training.distributed.partitioning import Shardings
from lin_jax.training.objectives import Objective
from lin_jax.training.objectives.registry import objective_of
from lin_jax.training.optimizer import build_optimizer
from lin_jax.training.setup import shardings_of
from lin_jax.training.train_step import TrainState, make_step
from pallas_kernels.implementations import compiling_for
from pallas_kernels.mesh_axes import ROWS

# What programs may use of a chip's memory, in GiB: the data sheet's size, less what the runtime keeps for itself.
MEMORY = {"v5e": 15.75, "v5p": 95.0, "v6e": 31.25}

AUGMENTED = AttentionConfig("augmented", 64, 63, implementation="tpu")
LLAMA = LlamaConfig(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11_008,
    num_layers=32,
    num_heads=32,
    attention=AUGMENTED,
    dtype="bfloat16",
    remat=True,
)
MODELS: dict[str, Any] = {
    "llama2-7b": LLAMA,
    "llama2-7b-windowed": replace(LLAMA, attention=AttentionConfig("exponential+window")),
    "llama2-13b": replace(LLAMA, hidden_size=5120, intermediate_size=13_824, num_layers=40, num_heads=40),
    "llama3-70b": replace(
        LLAMA,
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
    ),
    "flash-110m": FlashConfig(
        vocab_size=32_000,
        hidden_size=768,
        num_layers=16,
        attention=AttentionConfig("augmented", 256, 63),
        dtype="bfloat16",
        remat=True,
    ),
}


@dataclass(frozen=True)
class Plan:
    """A training step on a slice.

    Attributes:
        name: as it is printed.
        model: in MODELS.
        learns: `all`, or `lora` for the recipe of the paper: adapters on queries, keys, values and the way out, with
            embeddings, norms and mixers in full, on a frozen model in bfloat16.
        rows: of a step, for each part that rows are dealt to.
        length: tokens of a row.
        mesh: how the chips lie, with FSDP over all that it leaves.
        topologies: slices that it is meant for.
    """

    name: str
    model: str
    learns: str
    rows: int = 1
    length: int = 2048
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1))
    topologies: tuple[str, ...] = ("v5e:4x4", "v5e:16x16", "v5p:4x4x4")

    def run(self) -> RunConfig:
        """The run whose step it is; text and places are of no matter."""
        lora = self.learns == "lora"
        model = replace(MODELS[self.model], param_dtype="bfloat16" if lora else "float32")
        return RunConfig(
            output="-",
            family=family_of_config(model).name,
            init_from="-" if lora else None,
            adapters=AdapterConfig() if lora else None,
            model=model,
            optimizer=OptimizerConfig(),
            training=TrainingConfig(steps=1000),
        )

    def laid_out(self, chips: int) -> MeshConfig:
        """The mesh of so many chips."""
        others = (self.mesh.data or 1) * self.mesh.tensor * self.mesh.sequence
        return replace(self.mesh, fsdp=chips // others)


PLANS = {
    plan.name: plan
    for plan in (
        Plan("llama2-7b-lora", "llama2-7b", "lora"),
        Plan("llama2-7b-full", "llama2-7b", "all"),
        Plan("llama2-7b-windowed-lora", "llama2-7b-windowed", "lora", topologies=("v5e:4x4",)),
        Plan("llama2-13b-lora", "llama2-13b", "lora"),
        Plan("llama2-13b-full", "llama2-13b", "all"),
        Plan("flash-110m-pretraining", "flash-110m", "all", rows=4, length=1024),
        Plan("llama3-70b-lora", "llama3-70b", "lora", topologies=("v5e:16x16", "v5p:4x4x4")),
        Plan("llama3-70b-full", "llama3-70b", "all", topologies=("v5p:4x4x4",)),
        Plan(
            "llama2-7b-million-tokens",
            "llama2-7b",
            "lora",
            length=2**20,
            mesh=MeshConfig(data=1, sequence=256),
            topologies=("v5e:16x16",),
        ),
    )
}


def main() -> int:
    """Compiles, prints a table, and writes JSON after every row if asked to; 1 if something does not fit."""
    options = parse()
    jobs = [
        (PLANS[name], topology) for name in options.plans for topology in options.topologies or PLANS[name].topologies
    ]
    rows: list[dict[str, Any]] = []
    for plan, topology in tqdm(jobs, unit="program", disable=None):
        rows.append(measured(plan, topology, options.layers))
        tqdm.write(line(rows[-1]))
        if options.json is not None:
            write(header("pod plan") | {"plans": rows}, options.json)
    print("\n" + table(rows))
    return 0 if all(row["fits"] for row in rows) else 1


def parse() -> argparse.Namespace:
    """The command line."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS), metavar="NAME", help=", ".join(PLANS))
    parser.add_argument("--topologies", nargs="+", metavar="NAME", help="instead of those that each plan is for")
    parser.add_argument("--layers", type=int, metavar="N", help="another number of layers, to try something out")
    parser.add_argument("--json", metavar="FILE", help="write JSON to a file, after every program")
    options = parser.parse_args()
    for topology in options.topologies or ():
        if topology.partition(":")[0] not in MEMORY:
            raise UserError(f"--topologies {topology}: the chip is unknown; choose among {', '.join(MEMORY)}")
    return options


def measured(plan: Plan, topology: str, layers: int | None = None) -> dict[str, Any]:
    """What the compiler says of a plan on a slice."""
    chips = chips_of(topology)
    mesh = make_mesh(plan.laid_out(len(chips)), chips)
    limit = MEMORY[topology.partition(":")[0]]
    row: dict[str, Any] = {
        "plan": plan.name,
        "topology": topology,
        "chips": len(chips),
        "mesh": {name: size for name, size in mesh.shape.items() if size > 1},
        "length": plan.length,
        "gib_of_a_chip": limit,
    }
    began, run = time.perf_counter(), plan.run()
    if layers is not None:
        run = replace(run, model=replace(run.model, num_layers=layers))
    objective = objective_of(run)
    shardings = shardings_of(run, objective, mesh)
    row["rows"] = plan.rows * shardings.row_parts
    with compiling_for("tpu"), jax.set_mesh(mesh):
        try:
            compiled = lowered(run, objective, shardings, row["rows"], plan.length).compile()
        except jax.errors.JaxRuntimeError as problem:
            return row | {"fits": False, "problem": short(str(problem)), "seconds": time.perf_counter() - began}
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return row | {
        "gib_held": held / 2**30,
        "gib_in_between": memory.temp_size_in_bytes / 2**30,
        "fits": (held + memory.temp_size_in_bytes) / 2**30 <= limit,
        "tflop": cost.get("flops", 0) / 1e12,
        "kernels": kernels_in(compiled),
        "seconds": time.perf_counter() - began,
    }


def kernels_in(compiled: Any) -> int | None:
    """How many calls of kernels a program has; None where JAX cannot print it (some of v5p's)."""
    try:
        return int(compiled.as_text().count('custom_call_target="tpu_custom_call"'))
    except jax.errors.JaxRuntimeError:
        return None


def lowered(run: RunConfig, objective: Objective, shardings: Shardings, rows: int, length: int) -> Any:
    """The training loop's own step, on arrays that are shapes and places."""
    optimizer = build_optimizer(run.optimizer, run.training.steps, objective.rates)
    window = run.training.loss_spikes.window

    def new(params: Any) -> TrainState:
        return TrainState.new(params, optimizer, jax.random.key(0), window)

    state = placed(jax.eval_shape(new, objective.shapes()), shardings)
    base = abstract_model(run.model)
    frozen = jax.eval_shape(lambda params: objective.frozen(filled(base, params)), params_of(base))
    along = NamedSharding(shardings.mesh, PartitionSpec(ROWS))
    tokens = jax.ShapeDtypeStruct((rows, length + 1), jnp.int32, sharding=along)
    batch = {"tokens": tokens, "segment_ids": tokens}
    step = make_step(objective, optimizer, shardings=shardings, state=state)
    return step.lower(state, placed(frozen, shardings), batch)


def placed(tree: Any, shardings: Shardings) -> Any:
    """Shapes where a run has them."""
    return jax.tree.map(lambda leaf, where: leaf.update(sharding=where), tree, shardings.tree(tree))


def short(problem: str) -> str:
    """What the compiler says of memory, in one line."""
    found = re.search(r"Ran out of memory[^\n]*|Used [^\n]*", problem)
    return found[0] if found else problem.splitlines()[0][:200]


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    rows = f"{row['rows']} x {row['length']:,}"
    mesh = " x ".join(f"{name} {size}" for name, size in row["mesh"].items())
    if "problem" in row:
        return f"| {row['plan']} | {row['topology']}: {mesh} | {rows} | | | no: {row['problem']} |"
    whole = row["gib_held"] + row["gib_in_between"]
    return (
        f"| {row['plan']} | {row['topology']}: {mesh} | {rows} | {row['gib_held']:.2f} | {row['gib_in_between']:.2f} "
        f"| {'yes' if row['fits'] else 'no'}: {whole:.2f} of {row['gib_of_a_chip']} GiB |"
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """All rows, as Markdown."""
    head = "| plan | chips | rows of a step | GiB held a chip | GiB in between | fits |\n" + "| --- " * 6 + "|"
    return "\n".join([head, *map(line, rows)])


if __name__ == "__main__":
    exit_cleanly(main)
