"""Command `demo`: the whole way from text to a report, in about a dozen minutes on two cores."""

import argparse
import json
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lin_jax.decoding.autotune.plan import PLAIN
from lin_jax.decoding.autotune.prompts import held_out_prompts
from lin_jax.demo.measure import DrafterFigures, best_of, compare
from lin_jax.demo.report import write_report
from lin_jax.devices import devices_shown
from lin_jax.errors import OptionParser
from lin_jax.evaluation.head_accuracy import HeadAccuracy
from lin_jax.session import Session
from lin_jax.training import RunConfig, load_run_config
from lin_jax.training.checkpoint.files import saved_steps
from lin_jax.training.monitoring.trackers import read_metrics
from lin_jax.training.run import train

DRAFTERS = ("medusa", "ngram", "medusa+ngram")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, decodes, reports; what an earlier, interrupted call has finished is kept.

    Args:
        argv: the command line; None takes the process's own.
    """
    options = _parse(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    _say(f"on {devices_shown()}")
    began = time.perf_counter()
    folder = Path(options.output)
    if options.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    config = _placed(load_run_config(options.config), folder, options.data)
    heads = replace(
        _placed(load_run_config(options.heads_config), folder / "heads", options.data), init_from=str(folder)
    )
    for title, run in (("1/3 training the model", config), ("2/3 training its Medusa heads", heads)):
        _say(title)
        status = _train(run)
        if status:
            return status
    _say("3/3 decoding with and without speculation")
    session = Session.load(folder)
    found = held_out_prompts(config.data, session.tokenizer, 2 * options.prompts)
    prompts, calibration = found[: options.prompts], found[options.prompts : 4 * options.prompts]
    _say("    choosing draft trees for this machine")
    plans = session.plans(DRAFTERS, prompts=calibration, tokens=options.new_tokens, note=_say, shown=True)
    _say(f"    decoding {len(prompts)} held-out prompts")
    figures = compare(session, plans, prompts, options.new_tokens, options.rounds)
    report = _report(folder, figures, len(prompts)) | {
        "new_tokens_per_prompt": options.new_tokens,
        "rounds": options.rounds,
        "seconds": time.perf_counter() - began,
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    write_report(folder / "report.html", report, session.tokenizer, prompts, figures)
    _print_summary(report, folder)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OptionParser(prog="python -m lin_jax demo", description=__doc__)
    parser.add_argument("--data", metavar="PATH", help="file or folder of text (default: Python's standard library)")
    parser.add_argument("--output", default="runs/demo", metavar="DIR", help="where everything goes")
    parser.add_argument("--fresh", action="store_true", help="begin anew, deleting what an earlier call has left")
    parser.add_argument("--config", default="configs/demo.yaml", help="the model's training run")
    parser.add_argument("--heads-config", default="configs/demo_heads.yaml", help="the heads' training run")
    parser.add_argument("--prompts", type=int, default=10, metavar="N", help="held-out prompts to decode")
    parser.add_argument("--new-tokens", type=int, default=192, metavar="N", help="tokens to write for each of them")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="times that speed is measured")
    return parser.parse_args(argv)


def _placed(config: RunConfig, folder: Path, data: str | None) -> RunConfig:
    source = config.data if data is None else replace(config.data, source=data)
    return replace(config, output=str(folder), data=source)


def _train(config: RunConfig) -> int:
    """Runs or resumes a training run, unless it is already finished."""
    steps = saved_steps(Path(config.output)) if Path(config.output).exists() else []
    if steps and steps[-1] >= config.training.steps:
        _say(f"    already done ({config.output}); --fresh begins anew")
        return 0
    return train(config, resume=bool(steps)).status


def _report(folder: Path, figures: list[DrafterFigures], prompts: int) -> dict[str, Any]:
    """Builds the contents of report.json, but for how they were measured."""
    metrics = read_metrics(folder / "metrics.jsonl")
    perplexities = [line["validation_perplexity"] for line in metrics if "validation_perplexity" in line]
    best = best_of(figures)
    return {
        "lossless": all(f.lossless_greedy == f.lossless_sampled == prompts for f in figures),
        "plain_tokens_per_second": best.plain_tokens_per_second,
        "speculative_tokens_per_second": best.speculative_tokens_per_second,
        "speedup": best.speedup,
        "best_drafter": best.plan.name,
        "mean_accepted_tokens": best.mean_accepted_tokens,
        "initial_perplexity": perplexities[0],
        "validation_perplexity": perplexities[-1],
        "perplexity_ratio": perplexities[0] / perplexities[-1],
        "train_tokens": max(line["tokens"] for line in metrics if "tokens" in line),
        "state_bytes_per_sequence": best.generations[0].state_bytes,
        "prompts": prompts,
        "device": best.plan.device,
        "drafters": {
            f.plan.drafter: {
                "plain_tokens_per_second": f.plain_tokens_per_second,
                "speculative_tokens_per_second": f.speculative_tokens_per_second,
                "speedup": f.speedup,
                "mean_accepted_tokens": f.mean_accepted_tokens,
                "prompts_equal_greedy": f.lossless_greedy,
                "prompts_equal_sampled": f.lossless_sampled,
                "rounding_ties": f.rounding_ties,
                "tree": f.plan.tree,
                "expected_tokens": f.plan.expected_tokens if f.plan.drafts else None,
                "expected_speedup": f.plan.expected_speedup if f.plan.drafts else None,
                "accepted_histogram": f.accepted_histogram,
            }
            for f in figures
        },
        "head_accuracy": HeadAccuracy.load(folder / "heads" / "head_accuracy.json").table.tolist(),
        "validation": [
            [line["step"], line["validation_perplexity"]] for line in metrics if "validation_perplexity" in line
        ],
        "losses": [[line["step"], line["loss"]] for line in metrics if "loss" in line],
    }


def _print_summary(report: dict[str, Any], folder: Path) -> None:
    same = "the same text" if report["lossless"] else "NOT the same text"
    plain = f"plain {report['plain_tokens_per_second']:.0f} tokens/s"
    drafted = (
        f"speculative {report['speculative_tokens_per_second']:.0f} tokens/s ({report['best_drafter']}): "
        f"{report['speedup']:.2f}x, {same}"
    )
    if report["best_drafter"] == PLAIN:
        drafted = f"drafts do not pay on this machine, plain decoding is kept: 1.00x, {same}"
    _say(
        f"\nperplexity {report['initial_perplexity']:,.0f} -> {report['validation_perplexity']:.1f} on held-out text\n"
        f"{plain}, {drafted}\n"
        f"open {folder / 'report.html'}; or try: .venv/bin/python decode.py {folder} 'def main('"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
