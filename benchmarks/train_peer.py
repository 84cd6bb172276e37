"""Training flash-linear-attention's linear Transformer in PyTorch, as `train_speed.py` trains ours; needs a GPU.

    python benchmarks/train_peer.py --hidden-size 2048 --num-layers 16 --lengths 2048 8192 32768

Width, depth, heads and vocabulary are the same; parameters and their moments are bfloat16, half the bytes of ours. A
step is AdamW's fused one after as many parts as are asked for. Operations are counted as for our own models. Every row
of figures is printed as `json {...}`, for `train_speed.py` to read.
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any

WARM_UP = 2
CHUNK = 64


def main() -> int:
    """Measures and prints."""
    options = parse()
    for length in options.lengths:
        row = {"attention": f"fla {options.model}", "implementation": "pytorch", "length": length}
        for checkpointing in (False, True):
            try:
                row |= timed(options, length, checkpointing)
                break
            except Exception as problem:
                row |= {"failed": f"{type(problem).__name__}: {str(problem)[:1500]}"}
                if type(problem).__name__ != "OutOfMemoryError":
                    break
        if "step_seconds" in row:
            row.pop("failed", None)
            print(f"{row['attention']} {length} {row['tokens_per_second']:,.0f} tokens/s", file=sys.stderr, flush=True)
        print(f"json {json.dumps(row)}", flush=True)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("linear", "gla"), default="linear")
    for name, value in (("hidden", 2048), ("intermediate", 8192), ("vocab", 32_000)):
        parser.add_argument(f"--{name}-size", type=int, default=value)
    parser.add_argument("--num-layers", type=int, default=16)
    parser.add_argument("--num-heads", type=int, default=16)
    parser.add_argument("--lengths", nargs="+", type=int, default=(2048, 8192, 32768))
    parser.add_argument("--tokens", type=int, default=65536, help="of a step")
    parser.add_argument("--part", type=int, default=16384, help="tokens of a part of a step, at least a row")
    parser.add_argument("--steps", type=int, default=6)
    return parser.parse_args()


def build(options: argparse.Namespace, checkpointing: bool) -> Any:
    """The model, on the GPU."""
    import torch

    sizes = {
        "hidden_size": options.hidden_size,
        "intermediate_size": options.intermediate_size,
        "num_hidden_layers": options.num_layers,
        "num_heads": options.num_heads,
        "vocab_size": options.vocab_size,
        "use_cache": False,
    }
    if options.model == "gla":
        from fla.models import GLAConfig, GLAForCausalLM

        model = GLAForCausalLM(GLAConfig(**sizes, attn_mode="chunk"))
    else:
        from fla.models import LinearAttentionConfig, LinearAttentionForCausalLM

        model = LinearAttentionForCausalLM(LinearAttentionConfig(**sizes, attn_mode="chunk", feature_map="relu"))
    model = model.to("cuda", torch.bfloat16).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def timed(options: argparse.Namespace, length: int, checkpointing: bool) -> dict[str, Any]:
    """Steps on one batch again and again."""
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    model = build(options, checkpointing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rows = options.tokens // length
    parts = min(rows, max(1, options.tokens // options.part))
    tokens = torch.randint(0, options.vocab_size, (rows, length), device="cuda").square() % options.vocab_size
    losses, taken = [], []
    for _ in range(WARM_UP + options.steps):
        torch.cuda.synchronize()
        began, total = time.perf_counter(), 0.0
        for part in tokens.chunk(parts):
            loss = model(input_ids=part, labels=part).loss / parts
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(total))
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    spent = statistics.median(taken[WARM_UP:])
    count = sum(each.numel() for each in model.parameters())
    return {
        "parameters": count,
        "parts": parts,
        "checkpointing": checkpointing,
        "step_seconds": spent,
        "all_seconds": taken,
        "tokens_per_second": options.tokens / spent,
        "model_flops": options.tokens * token_flops(options, count),
        "losses": losses,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def token_flops(options: argparse.Namespace, count: int) -> float:
    """Operations of a step for each token: six a weight that is multiplied with, and attention's, chunk by chunk."""
    weights = count - options.vocab_size * options.hidden_size
    size = options.hidden_size // options.num_heads
    pairs = 4 * options.hidden_size * (CHUNK + 1) / 2
    return 6 * weights + 3 * options.num_layers * (pairs + 4 * options.hidden_size * size)


if __name__ == "__main__":
    sys.exit(main())
