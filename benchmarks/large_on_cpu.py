"""A model of LLaMA-3.2-1B's shapes on a CPU: our plain decoding against Hugging Face's `generate`, each in a process.

    python benchmarks/large_on_cpu.py [--layers 16] [--folder DIR] [--tokens 40] [--rounds 3] [--json FILE]

The folder has random weights in bfloat16, with so little in what layers add that a text repeats its last token.
Contenders take turns, round after round, and medians are taken: `generate` in bfloat16 and float32, plain and with
prompt lookup, and ours in every type asked for, with softmax and with a linear attention in its place, plain and with
copies of what the text had before. Every process says how long loading and the first token took, the tokens per second
after it, and the most memory that it had.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from lib.report import header, write
from tqdm import tqdm

from lin_jax.errors import UserError, exit_cleanly

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
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
    "vocab_size": 128256,
}
CONTENDERS = (
    *("hf:bfloat16", "hf:float32", "hf:bfloat16:lookup"),
    *("ours:softmax:stored", "ours:augmented:stored", "ours:augmented:int8"),
    *("ours:augmented:stored:copies", "ours:augmented:int8:copies"),
)
PROMPT = 16
# Tokens that are guessed at a time where a text is copied.
COPIED = 7
KILO = 1024
# Weights of what layers add to a token's vector.
ADDED = ("o_proj.weight", "down_proj.weight")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = _parse(argv)
    if options.contender:
        return _contend(options)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        if not (folder / "config.json").is_file():
            make_folder(folder, options.layers)
        size = (folder / "model.safetensors").stat().st_size
        about = header("large_on_cpu")
        print(f"{about['device']}; folder of {size / 2**30:.2f} GiB, {options.layers} layers", file=sys.stderr)
        turns = [name for _ in range(options.rounds) for name in options.contenders]
        found: dict[str, list[dict[str, float]]] = {name: [] for name in options.contenders}
        for name in tqdm(turns, file=sys.stderr, disable=not sys.stderr.isatty()):
            found[name].append(_run(folder, name, options.tokens))
    rows = {name: _medians(runs) for name, runs in found.items()}
    print(f"{'':<32}{'load s':>10}{'first token s':>16}{'tokens/s':>12}{'peak GiB':>12}")
    for name, row in rows.items():
        figures = row["load_seconds"], row["first_token_seconds"], row["tokens_per_second"], row["peak_bytes"] / 2**30
        print(f"{name:<32}{figures[0]:>10.2f}{figures[1]:>16.2f}{figures[2]:>12.2f}{figures[3]:>12.2f}")
    if options.json:
        write({**about, "folder_bytes": size, "layers": options.layers, "rounds": options.rounds, **rows}, options.json)
    return 0


def make_folder(folder: Path, layers: int) -> None:
    """Writes a Hugging Face folder of random weights in bfloat16, which begin at a multiple of 64 bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}, indent=1))
    shapes = dict(_shapes(layers))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % 64)
    numbers = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            deviation = 0.0 if len(shape) == 1 else 2e-4 if name.endswith(ADDED) else 0.02
            values = numbers.standard_normal(shape, np.float32) * np.float32(deviation) + np.float32(len(shape) == 1)
            file.write(values.astype(ml_dtypes.bfloat16).tobytes())


def _shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors."""
    size, inner, vocabulary = (int(CONFIG[name]) for name in ("hidden_size", "intermediate_size", "vocab_size"))
    kept = int(CONFIG["num_key_value_heads"]) * int(CONFIG["head_dim"])
    yield "model.embed_tokens.weight", (vocabulary, size)
    for layer in range(layers):
        place = f"model.layers.{layer}."
        for name, shape in (
            ("self_attn.q_proj", (size, size)),
            ("self_attn.k_proj", (kept, size)),
            ("self_attn.v_proj", (kept, size)),
            ("self_attn.o_proj", (size, size)),
            ("mlp.gate_proj", (inner, size)),
            ("mlp.up_proj", (inner, size)),
            ("mlp.down_proj", (size, inner)),
            ("input_layernorm", (size,)),
            ("post_attention_layernorm", (size,)),
        ):
            yield f"{place}{name}.weight", shape
    yield "model.norm.weight", (size,)


def _run(folder: Path, contender: str, tokens: int) -> dict[str, float]:
    """One contender in a process of its own."""
    command = [sys.executable, __file__, "--folder", str(folder), "--tokens", str(tokens), "--contender", contender]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{contender} failed: {done.stderr.strip().splitlines()[-1:]}; run it alone with --contender")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _contend(options: argparse.Namespace) -> int:
    kind, *how = options.contender.split(":")
    prompt = [1 + 7 * at % 1000 for at in range(PROMPT)]
    figures = _theirs(options, *how, prompt=prompt) if kind == "hf" else _ours(options, *how, prompt=prompt)
    print(json.dumps({**figures, "peak_bytes": _peak()}))
    return 0


def _peak() -> int:
    """The most memory that this process had: resident pages, mapped files included. A parent's is not counted."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * KILO
    raise UserError("this system does not tell the memory of a process; run it on Linux")


def _theirs(options: argparse.Namespace, dtype: str, lookup: str = "", *, prompt: list[int]) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    begun = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=getattr(torch, dtype)).eval()
    loaded = time.perf_counter()
    inputs = torch.tensor([prompt])
    ask = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(inputs)}
    if lookup:
        ask["prompt_lookup_num_tokens"] = COPIED

    def seconds(count: int) -> float:
        start = time.perf_counter()
        model.generate(inputs, max_new_tokens=count, min_new_tokens=count, **ask)
        return time.perf_counter() - start

    with torch.inference_mode():
        first = seconds(1)
        again, whole = seconds(1), seconds(options.tokens + 1)
    return _figures(loaded - begun, first, options.tokens / (whole - again))


def _ours(
    options: argparse.Namespace, attention: str, weights: str, copies: str = "", *, prompt: list[int]
) -> dict[str, float]:
    from lin_jax.attention import AttentionConfig
    from lin_jax.decoding import Generator, NgramDrafter, chain
    from lin_jax.models.stored_weights import WeightStorage
    from lin_jax.session import load_for_decoding
    from lin_jax.training.model_source import ModelSource

    begun = time.perf_counter()
    source = ModelSource.open(options.folder)
    mixer = None if attention == "softmax" else AttentionConfig(attention)
    model = load_for_decoding(source, storage=WeightStorage(weights), attention=mixer)
    drafts = {"drafter": NgramDrafter(depth=COPIED, matches=1), "tree": chain(COPIED)} if copies else {}
    generator = Generator(model, **drafts)
    loaded = time.perf_counter()
    generator.generate([prompt], 1)
    first = time.perf_counter() - loaded
    generator.generate([prompt], options.tokens + 1)
    return _figures(loaded - begun, first, generator.generate([prompt], options.tokens + 1).tokens_per_second)


def _figures(load: float, first: float, rate: float) -> dict[str, float]:
    return {"load_seconds": load, "first_token_seconds": first, "tokens_per_second": rate}


def _medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.median([run[name] for run in runs])) for name in runs[0]}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help="layers of the model (default: 16, as LLaMA-3.2-1B)")
    parser.add_argument("--folder", metavar="DIR", help="folder of the model, made if it is not there and kept")
    parser.add_argument("--tokens", type=int, default=40, help="tokens after the first (default: 40)")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each contender (default: 3)")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--contender", choices=CONTENDERS, help="run this one alone, in this process")
    parser.add_argument("--json", metavar="FILE", help="write the report there; - is standard output")
    options = parser.parse_args(argv)
    for name in ("layers", "tokens", "rounds"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; give a positive number")
    if options.contender and not options.folder:
        raise UserError("--contender runs on a folder; give --folder")
    return options


if __name__ == "__main__":
    exit_cleanly(main)
