"""Few-shot tasks of lm-evaluation-harness with the states of shared prefixes, and without: time, tokens read, answers.

    python benchmarks/lm_eval_prefixes.py [--model FOLDER] [--questions 24] [--shots 5] [--rounds 3]

Every question has the same examples before it and four answers, as with the sampler `first_n`; answers of one task are
scored, those of the other are written. Both ways take turns, and the least time of each counts, as what else a machine
does only adds to it. Without --model, it is a small model with random weights. Needs the extra `eval`.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lib.report import header, write

from lin_jax.errors import UserError, exit_cleanly

WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")
ANSWERS = (" yes it is", " no it is not", " nobody knows", " perhaps")
# Log-likelihoods in float32 may differ by the order in which tokens were read.
CLOSE = 1e-3


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 1 if the answers differ."""
    options = _parse(argv)
    try:
        import lin_jax.lm_eval as harness
    except ImportError as error:
        raise UserError(str(error)) from error
    about = header("lm_eval_prefixes")
    with tempfile.TemporaryDirectory() as place:
        model = options.model or _small_model(Path(place) / "model", options.hidden, options.layers)
        common = {"batch_size": options.batch, "drafter": "none"}
        ways = {share: harness.LinJaxLM(model, shared_prefixes=share, **common) for share in (True, False)}
    chance = random.Random(0)
    contexts = _contexts(chance, options.questions, options.shots)
    scored = [_Request((context, answer)) for context in contexts for answer in ANSWERS]
    written = [_Request((context, {"until": ["\n\n"], "max_gen_toks": options.tokens})) for context in contexts]
    print(f"{about['device']}; {len(ways[True].tok_encode(contexts[0]))} tokens before an answer", file=sys.stderr)
    rows = [
        _measure("scored", ways, lambda model: model.loglikelihood(scored, disable_tqdm=True), options.rounds),
        _measure("written", ways, lambda model: model.generate_until(written, disable_tqdm=True), options.rounds),
    ]
    for row in rows:
        print(
            f"{row['task']:<8} {row['requests']:>5} requests: {row['shared_seconds']:.3f} s with shared prefixes, "
            f"{row['alone_seconds']:.3f} s without, {row['speedup']:.2f} times as fast (processor time "
            f"{row['cpu_speedup']:.2f}); answers {'the same' if row['same'] else 'DIFFER'}"
        )
    if options.json:
        write({**about, "tasks": rows}, options.json)
    return 0 if all(row["same"] for row in rows) else 1


class _Request:
    """What the harness hands over: arguments, and nothing else that is needed here."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args = args


def _measure(task: str, ways: dict[bool, Any], run: Callable[[Any], list[Any]], rounds: int) -> dict[str, Any]:
    """Times a task both ways, in turns; the first round, which compiles, does not count."""
    found = {share: run(model) for share, model in ways.items()}
    wall: dict[bool, list[float]] = {share: [] for share in ways}
    processor: dict[bool, list[float]] = {share: [] for share in ways}
    for _ in range(rounds):
        for share, model in ways.items():
            began = time.perf_counter(), time.process_time()
            run(model)
            wall[share].append(time.perf_counter() - began[0])
            processor[share].append(time.process_time() - began[1])
    return {
        "task": task,
        "requests": len(found[True]),
        "shared_seconds": min(wall[True]),
        "alone_seconds": min(wall[False]),
        "speedup": min(wall[False]) / min(wall[True]),
        "cpu_speedup": min(processor[False]) / min(processor[True]),
        "same": _same(found[True], found[False]),
    }


def _same(one: list[Any], other: list[Any]) -> bool:
    if isinstance(one[0], str):
        return one == other
    return bool(np.allclose([each[0] for each in one], [each[0] for each in other], rtol=0, atol=CLOSE))


def _contexts(chance: random.Random, questions: int, shots: int) -> list[str]:
    def question() -> str:
        return f"Question: is the {' of the '.join(chance.choices(WORDS, k=6))}?\nAnswer:"

    examples = "\n\n".join(question() + chance.choice(ANSWERS) for _ in range(shots))
    return [f"{examples}\n\n{question()}" for _ in range(questions)]


def _small_model(place: Path, hidden: int, layers: int) -> str:
    """Writes a model with random weights and a tokenizer."""
    from flax import nnx

    from lin_jax.attention import AttentionConfig
    from lin_jax.data import Tokenizer
    from lin_jax.hub import save_pretrained
    from lin_jax.models import Llama, LlamaConfig

    tokenizer = Tokenizer.train([f"Question: is the {word} of the?\nAnswer: {''.join(ANSWERS)}" for word in WORDS], 400)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_layers=layers,
        num_heads=4,
        initializer_range=0.1,
        attention=AttentionConfig(group_size=32, kernel_size=7, initial_alpha=0.3),
    )
    return str(save_pretrained(Llama(config, rngs=nnx.Rngs(0)), place, tokenizer=tokenizer))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FOLDER", help="model to measure (default: a small one, random)")
    parser.add_argument("--hidden", type=int, default=128, help="width of the small model (default: 128)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the small model (default: 4)")
    parser.add_argument("--questions", type=int, default=24, help="questions of a task (default: 24)")
    parser.add_argument("--shots", type=int, default=5, help="examples before each (default: 5)")
    parser.add_argument("--tokens", type=int, default=8, help="tokens of a written answer (default: 8)")
    parser.add_argument("--batch", type=int, default=16, help="texts at a time (default: 16)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count (default: 3)")
    parser.add_argument("--json", metavar="FILE", help="write the report there; - is standard output")
    options = parser.parse_args(argv)
    for name in ("hidden", "layers", "questions", "tokens", "batch", "rounds"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; give at least 1")
    return options


if __name__ == "__main__":
    exit_cleanly(main)
