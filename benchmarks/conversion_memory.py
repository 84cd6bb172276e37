"""Peak memory of `hub import` and `hub export` over the size of a folder: does it grow with the model?

    python benchmarks/conversion_memory.py [--gigabytes 1] [--shards 4] [--in-memory] [--folder DIR] [--json FILE]

The folder is a LLaMA of LLaMA-3.2-1B's widths with random weights in bfloat16, of as many layers as the size asks for,
in several files. A process of its own converts it with `python -m lin_jax hub import`, and reports the most memory that
it ever had (ru_maxrss); another one exports the folder that came of it, which must stay as it is. `--in-memory`
converts the first by `from_pretrained` and `save_pretrained`, too, for which the model is in memory, and compares the
bytes of both folders.
"""

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from lib.report import header, write
from tqdm import tqdm

from lin_jax.errors import exit_cleanly
from lin_jax.hub.conversion.tensor_file import StreamedTensor, write_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
ROOT = Path(__file__).parents[1]
BLOCK = 1 << 20
# What a conversion may have beside its largest tensor, whatever the size of the model.
ALLOWED = 1.5e9


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 1 if a conversion takes more than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the folder")
    parser.add_argument("--shards", type=int, default=4, help="its files")
    parser.add_argument("--attention", default="augmented", help="what it is converted to")
    parser.add_argument("--dtype", default="bfloat16", help="type that it is converted to")
    parser.add_argument("--in-memory", action="store_true", help="also convert it by way of a whole model")
    parser.add_argument("--folder", help="where to work (default: a temporary folder)")
    parser.add_argument("--json", metavar="FILE", help="write the report to this file")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        place = Path(temporary)
        size, largest = make_folder(place / "source", options.gigabytes * 1e9, options.shards)
        asked = (options.attention, options.dtype, str(size // options.shards + 1))
        rows = {"hub import": measured(_command(place, asked)), "hub export": measured(_export(place, asked))}
        rows["hub export"]["same_bytes"] = _same(place / "streamed", place / "exported")
        shutil.rmtree(place / "exported")
        if options.in_memory:
            rows["in memory"] = measured(_in_memory(place, asked))
            rows["in memory"]["same_bytes"] = _same(place / "streamed", place / "held")
    limit = ALLOWED + largest
    report = {**header("conversion_memory"), "bytes": size, "largest_tensor": largest, "allowed": limit, "rows": rows}
    for name, row in rows.items():
        row["over_folder"] = round(row["peak_bytes"] / size, 2)
        print(
            f"{name}: peak {row['peak_bytes'] / 1e9:.2f} GB, {row['over_folder']:.2f} times the folder's "
            f"{size / 1e9:.2f} GB, in {row['seconds']:.0f} s"
        )
    print(f"allowed whatever the size: {limit / 1e9:.2f} GB")
    if options.json:
        write(report, options.json)
    too_much = any(rows[name]["peak_bytes"] > limit for name in ("hub import", "hub export"))
    return int(too_much or not all(row.get("same_bytes", True) for row in rows.values()))


def make_folder(folder: Path, size: float, shards: int) -> tuple[int, int]:
    """Writes a folder of about so many bytes; returns its size, and that of its largest tensor."""
    folder.mkdir(parents=True)
    layer = sum(2 * int(np.prod(shape)) for shape in _layer_shapes().values())
    ends = {"model.embed_tokens.weight": (CONFIG["vocab_size"], CONFIG["hidden_size"]), "model.norm.weight": (2048,)}
    count = max(1, round((size - 2 * CONFIG["vocab_size"] * CONFIG["hidden_size"]) / layer))
    shapes = {f"model.layers.{n}.{name}": shape for n in range(count) for name, shape in _layer_shapes().items()} | ends
    tensors = {
        name: StreamedTensor(shape, np.dtype(ml_dtypes.bfloat16), _random(shape)) for name, shape in shapes.items()
    }
    names = list(tensors)
    dealt = [names[begin::shards] for begin in range(shards)]
    files = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)]
    with tqdm(total=sum(each.nbytes for each in tensors.values()), unit="B", unit_scale=True, disable=None) as bar:
        for file, part in zip(files, dealt, strict=True):
            write_file({name: tensors[name] for name in part}, folder / file, bar.update)
    index = {name: file for file, part in zip(files, dealt, strict=True) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": count}))
    sizes = [each.nbytes for each in tensors.values()]
    return sum(sizes), max(sizes)


def _layer_shapes() -> dict[str, tuple[int, ...]]:
    wide, inner, small = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["num_key_value_heads"] * 64
    return {
        "input_layernorm.weight": (wide,),
        "post_attention_layernorm.weight": (wide,),
        "self_attn.q_proj.weight": (wide, wide),
        "self_attn.k_proj.weight": (small, wide),
        "self_attn.v_proj.weight": (small, wide),
        "self_attn.o_proj.weight": (wide, wide),
        "mlp.gate_proj.weight": (inner, wide),
        "mlp.up_proj.weight": (inner, wide),
        "mlp.down_proj.weight": (wide, inner),
    }


def _random(shape: tuple[int, ...]) -> Callable[[], Iterator[np.ndarray]]:
    def blocks() -> Iterator[np.ndarray]:
        draw, left = np.random.default_rng(int(np.prod(shape))), int(np.prod(shape))
        while left:
            block = draw.standard_normal(min(left, BLOCK), np.float32) * 0.02
            left -= block.size
            yield block.astype(ml_dtypes.bfloat16)

    return blocks


def _command(place: Path, asked: tuple[str, str, str]) -> list[str]:
    attention, dtype, most = asked
    words = ["-m", "lin_jax", "hub", "import", str(place / "source"), str(place / "streamed")]
    return [*words, "--attention", attention, "--dtype", dtype, "--max-shard-bytes", most]


def _export(place: Path, asked: tuple[str, str, str]) -> list[str]:
    words = ["-m", "lin_jax", "hub", "export", str(place / "streamed"), str(place / "exported")]
    return [*words, "--max-shard-bytes", asked[2]]


def _in_memory(place: Path, asked: tuple[str, str, str]) -> list[str]:
    attention, dtype, most = asked
    source = (
        "import json, pathlib, sys; from lin_jax.hub import from_pretrained, save_pretrained; "
        "place, attention, dtype, most = sys.argv[1:]; place = pathlib.Path(place); "
        "model = from_pretrained(place / 'source', attention=attention, param_dtype=dtype); "
        "raw = json.loads((place / 'source/config.json').read_text()); "
        "save_pretrained(model, place / 'held', source=raw, base='source', max_shard_bytes=int(most))"
    )
    return ["-c", source, str(place), attention, dtype, most]


def measured(words: Sequence[str]) -> dict[str, Any]:
    """Runs Python with some words; the most memory that it had, in bytes, and how long it took."""
    begin = time.perf_counter()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen([sys.executable, *words], env={**os.environ, "PYTHONPATH": path})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(words[:4])} ended with status {process.returncode}")
    return {"peak_bytes": usage.ru_maxrss * 1024, "seconds": time.perf_counter() - begin, "cpu": usage.ru_utime}


def _same(one: Path, other: Path) -> bool:
    """True if two folders hold the same files; cards name their folder."""
    names = sorted(path.name for path in one.iterdir() if path.is_file() and path.name != "README.md")
    if names != sorted(path.name for path in other.iterdir() if path.is_file() and path.name != "README.md"):
        return False
    return filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


if __name__ == "__main__":
    exit_cleanly(main)
