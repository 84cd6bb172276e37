"""Speculation in an exported folder against the folder's own plain `generate`, in PyTorch on a CPU.

    python benchmarks/export_speculation.py [--folder DIR --prompt TEXT ...] [--rows 1] [--tokens 120] [--rounds 5]
        [--json FILE]

Without a folder, a linearized LLaMA is made and exported whose layers do their work and change next to nothing, so that
the next token follows from the last one alone, among 32: greedy text turns in a circle, as text that repeats itself,
which n-gram drafts are for. With a folder, prompts are continued by its model; texts that quote their prompt show what
drafts are worth, others what they cost. Both ways take turns, text by text and round by round, and the ratio is that of
the fastest of each, by the clock and by processor time. The texts must be equal, token for token. With `--rows`, as
many texts are written at once.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lib.report import header, write
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lin_jax.errors import exit_cleanly


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 1 if a text differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="exported folder (default: a small model with random weights)")
    parser.add_argument("--prompt", action="append", help="text to go on from; may be given several times")
    parser.add_argument("--attention", default="augmented", help="of the model with random weights")
    parser.add_argument("--layers", type=int, default=8, help="of that model")
    parser.add_argument("--width", type=int, default=512, help="of that model")
    parser.add_argument("--texts", type=int, default=3, help="texts of that model")
    parser.add_argument("--rows", type=int, default=1, help="texts at once, of that model")
    parser.add_argument("--tokens", type=int, default=120, help="new tokens of a text")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--json", metavar="FILE", help="write the report to this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        if options.folder is None:
            make_folder(folder, options.attention, options.layers, options.width)
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        rows = []
        for prompt in prompts(folder, options.prompt, options.texts, options.rows):
            rows.append(row := compared(model, prompt, options))
            print(
                f"{row['rows']} x {row['prompt_tokens']} + {row['tokens']} tokens: plain {row['plain_s']:.2f} s, "
                f"with drafts {row['drafted_s']:.2f} s, {row['ratio']:.2f} times as fast ({row['cpu_ratio']:.2f} by "
                f"processor time); {row['passes']} passes, equal: {row['equal']}",
                flush=True,
            )
    print(f"median of the ratios: {statistics.median(row['ratio'] for row in rows):.2f}")
    if options.json:
        write(
            {**header("export_speculation"), "torch": torch.__version__, "threads": options.threads, "rows": rows},
            options.json,
        )
    return int(not all(row["equal"] for row in rows))


def make_folder(folder: Path, attention: str, layers: int, width: int) -> None:
    """Exports a LLaMA with random weights, whose text turns in a circle."""
    from flax import nnx

    from lin_jax.attention import AttentionConfig
    from lin_jax.hub import save_pretrained
    from lin_jax.models import Llama, LlamaConfig

    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_layers": layers, "num_heads": width // 64}
    config = LlamaConfig(vocab_size=8000, **sizes, attention=AttentionConfig(attention), tie_embeddings=False)
    model = Llama(config, rngs=nnx.Rngs(0))
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-2:] in (("out", "kernel"), ("down", "kernel")):
            variable.set_value(variable[...] * 1e-3)
        if path == ("head", "kernel"):
            variable.set_value(variable[...].at[:, 32:].set(0))
    save_pretrained(model, folder, overwrite=True)


def prompts(folder: Path, given: Sequence[str] | None, count: int, rows: int) -> list[torch.Tensor]:
    """Tokens `[B, T]` of texts; without any, so many random ones of so many rows."""
    if not given:
        draw = torch.Generator().manual_seed(0)
        return [torch.randint(1, 200, (rows, 32), generator=draw) for _ in range(count)]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return [tokenizer(text, return_tensors="pt")["input_ids"] for text in given]


def compared(model: PreTrainedModel, prompt: torch.Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Times of both ways, in turn; and how many passes the drafts took."""
    greedy = {"max_new_tokens": options.tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    texts, passes = {}, 0
    for number in range(options.rounds + 1):
        for way in (False, True):
            count = _CountedCalls(model.lm_head)
            begin = time.perf_counter(), time.process_time()
            text = model.generate(prompt, **greedy, speculative=way)
            if number:  # the first round warms up
                times[way].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
            texts[way], passes = text, count.stop()
    plain, drafted = (min(wall for wall, _ in times[way]) for way in (False, True))
    plain_cpu, drafted_cpu = (min(cpu for _, cpu in times[way]) for way in (False, True))
    return {
        "rows": prompt.shape[0],
        "prompt_tokens": prompt.shape[1],
        "tokens": texts[True].shape[1] - prompt.shape[1],
        "plain_s": plain,
        "drafted_s": drafted,
        "ratio": plain / drafted,
        "cpu_ratio": plain_cpu / drafted_cpu,
        "passes": passes,
        "equal": texts[False].tolist() == texts[True].tolist(),
    }


class _CountedCalls:
    """Counts the calls of a module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.count = 0
        self.hook = module.register_forward_hook(self._called)

    def _called(self, *_: Any) -> None:
        self.count += 1

    def stop(self) -> int:
        """The calls so far; they are counted no longer."""
        self.hook.remove()
        return self.count


if __name__ == "__main__":
    exit_cleanly(main)
