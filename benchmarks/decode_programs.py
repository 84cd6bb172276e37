"""Decode steps as the TPU compiler makes them: bytes, fusions and kernels of verification and of commits; no device.

    python benchmarks/decode_programs.py [--cells 1,1,1 1,64,5 ...] [--implementations xla tpu] [--json FILE]

A cell is rows, nodes of the draft tree, and tokens of the path that may be committed. Bytes are what the compiler
counts ("bytes accessed"): what fusions read and write in HBM or VMEM, the body of the loop over layers once. Needs
libtpu (`make test` puts it into .venv/libtpu).
"""

import argparse
import re
from collections.abc import Callable
from typing import Any

from lib.tpu_compiler import chips_of  # isort: skip

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lib.report import header, write

from lin_jax.attention import AttentionConfig, TreeArrays
from lin_jax.errors import OptionParser, UserError, exit_cleanly
from lin_jax.models import Llama, LlamaConfig
from pallas_kernels.implementations import compiling_for


def main() -> int:
    """Compiles, prints, and writes JSON if asked to, row by row."""
    options = parse()
    report: dict[str, Any] = header("decode programs") | {"topology": options.topology, "results": []}
    sharding = NamedSharding(Mesh(np.array(chips_of(options.topology)[:1]), ("chip",)), PartitionSpec())
    for cell in options.cells:
        for implementation in options.implementations:
            for row in compiled(implementation, cell, sharding, options):
                report["results"].append(row)
                print(line(row), flush=True)
                if options.json not in (None, "-"):
                    write(report, options.json)
    if options.json == "-":
        write(report, "-")
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=("1,1,1", "1,64,5", "8,16,5"), metavar="B,N,P")
    parser.add_argument("--implementations", nargs="+", default=("xla", "tpu"), metavar="NAME")
    parser.add_argument("--attention", default="hedgehog+window", metavar="NAME")
    parser.add_argument("--window", type=int, metavar="TOKENS", help="a sliding window instead of one of groups")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--topology", default="v5e:2x2", metavar="NAME")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to a file, or print it")
    options = parser.parse_args()
    options.cells = [parse_cell(text) for text in options.cells]
    return options


def parse_cell(text: str) -> tuple[int, int, int]:
    """Rows, nodes and tokens of a path from `B,N,P`."""
    try:
        rows, nodes, path = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"the cell '{text}' is not understood; give B,N,P such as 8,16,5") from None
    if min(rows, nodes, path) < 1 or path > nodes:
        raise UserError(f"the cell '{text}' needs sizes from 1 on, and no longer a path than there are nodes")
    return rows, nodes, path


def compiled(
    implementation: str, cell: tuple[int, int, int], sharding: NamedSharding, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Verification with logits, and the commit, of a bfloat16 model with layers that are scanned."""
    rows, nodes, path = cell
    hidden = options.heads * options.head_size
    attention = AttentionConfig(options.attention, window=options.window, implementation=implementation)
    sizes = {"hidden_size": hidden, "intermediate_size": 11 * hidden // 4, "num_heads": options.heads}
    sizes |= {"num_kv_heads": options.heads, "num_layers": options.layers}
    config = LlamaConfig(**sizes, vocab_size=32000, attention=attention, dtype="bfloat16", param_dtype="bfloat16")
    graph, params = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))

    def here(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    def numbers(*shape: int, dtype: Any = jnp.int32) -> Any:
        return here(jax.ShapeDtypeStruct(shape, dtype))

    def verify(params: Any, tokens: Any, tree: TreeArrays, state: Any) -> Any:
        model = nnx.merge(graph, params)
        hidden, found = model.verify(tokens, tree, state)
        return model.logits(hidden), found

    def commit(params: Any, state: Any, found: Any, taken: Any, length: Any) -> Any:
        return nnx.merge(graph, params).commit(state, found, taken, length)

    params = here(params)
    state = here(jax.eval_shape(lambda params: nnx.merge(graph, params).init_state(rows), params))
    tree = TreeArrays(numbers(nodes), numbers(nodes, nodes, dtype=bool))
    asked = params, numbers(rows, nodes), tree, state
    with compiling_for("tpu"):
        found = here(jax.eval_shape(verify, *asked)[1])
    committed = params, state, found, numbers(rows, path), numbers(rows)
    about = {"implementation": implementation, "rows": rows, "nodes": nodes, "path": path}
    return [
        about | {"program": "verify"} | figures(verify, asked),
        about | {"program": "commit"} | figures(commit, committed, 1),
    ]


def figures(program: Callable[..., Any], arguments: Any, donated: int | None = None) -> dict[str, int]:
    """What the compiler says of a program."""
    with compiling_for("tpu"):
        made = jax.jit(program, donate_argnums=() if donated is None else donated).lower(*arguments).compile()
    text, counted = made.as_text(), made.cost_analysis()
    return {
        "bytes": int(counted["bytes accessed"]),
        "fusions": len(re.findall(r" fusion\(", text)),
        "copies": len(re.findall(r" copy\(", text)),
        "loops": len(re.findall(r" while\(", text)),
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
    }


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    what = f"{row['program']:6} {row['rows']:>2} rows {row['nodes']:>3} nodes, path of {row['path']}"
    return (
        f"{what}  {row['implementation']:4} {row['bytes'] / 2**20:9,.1f} MiB, {row['fusions']} fusions, "
        f"{row['copies']} copies, {row['loops']} loops, {row['kernels']} kernels"
    )


if __name__ == "__main__":
    exit_cleanly(main)
