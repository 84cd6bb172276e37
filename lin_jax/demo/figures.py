"""The demo's report as figures: the contents of `report.json`, and the headline that they bear out."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lin_jax.decoding.autotune.plan import PLAIN
from lin_jax.demo.runs import AUGMENTED, BARE, BEST

# A ratio nearer to one than this is none: perplexities, and speeds, which are noisier.
SAME_QUALITY, SAME_SPEED = 0.0005, 0.02


@dataclass(frozen=True)
class Finding:
    """An answer of the report in one sentence.

    Attributes:
        text: the sentence.
        won: whether it speaks for what the package does.
    """

    text: str
    won: bool


def build_report(
    results: Mapping[str, Mapping[str, Any]], seconds: Mapping[str, float], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Builds the contents of `report.json`.

    Args:
        results: of the parts `quality`, `decoding` and `context`.
        seconds: by part.
        about: machine, text, numbers of prompts, tokens and rounds.
    """
    quality, decoding = results["quality"], results["decoding"]
    best = decoding["drafters"].get(decoding["best_drafter"])
    plain = decoding["plain_tokens_per_second"]
    every = decoding["drafters"].values()
    count = len(decoding["samples"])
    report = {
        "lossless": all(each["prompts_equal_greedy"] == each["prompts_equal_sampled"] == count for each in every),
        "speedup": 1.0 if best is None else best["speedup"],
        "best_drafter": decoding["best_drafter"],
        "plain_tokens_per_second": plain,
        "speculative_tokens_per_second": plain if best is None else best["tokens_per_second"],
        "softmax_tokens_per_second": decoding["softmax_tokens_per_second"],
        "mean_accepted_tokens": 1.0 if best is None else best["tokens_per_step"],
        "teacher_perplexity": quality["teacher"]["perplexity"],
        "students": quality["students"],
        "baselines": quality["baselines"],
        "held_out": {name: quality[name] for name in ("tokens", "rows", "row_length")},
        "state_bytes": decoding["state_bytes"],
        "softmax_state_bytes": decoding["softmax_state_bytes"],
        "drafters": decoding["drafters"],
        "context": results["context"],
        "samples": decoding["samples"],
        "seconds": {**seconds, "total": sum(seconds.values())},
        **about,
    }
    findings = find(report)
    return {"headline": headline(findings), "findings": [asdict(each) for each in findings], **report}


def headline(findings: list[Finding]) -> str:
    """The two claims in one line, what was not won after what was; then everything else that was not won."""
    loss, speed, *others = findings
    first = f"{loss.text}; {speed.text}"
    lost = [each.text for each in others if not each.won]
    return first if not lost else f"{first}. Not won: {'; '.join(lost)}"


def find(report: Mapping[str, Any]) -> list[Finding]:
    """The findings, the two claims first: perplexity of the best student, and speed with drafts."""
    students = report["students"]
    found = [_loss(students[BEST]["ratio"]), _drafts(report)]
    found += [_augmentation(students[BARE]["ratio"], students[AUGMENTED]["ratio"])]
    found += [_memory(students[BEST]["ratio"], name, each["ratio"]) for name, each in report["baselines"].items()]
    found += [_softmax(report), *_context(report["context"])]
    return found


def _loss(ratio: float) -> Finding:
    if abs(ratio - 1) < SAME_QUALITY:
        return Finding(f"{BEST} has its teacher's perplexity", won=True)
    change = f"{abs(100 * (ratio - 1)):.1f}%"
    if ratio < 1:
        return Finding(f"{BEST} has a perplexity {change} below its teacher's", won=True)
    # Beyond a tenth it is another model.
    return Finding(f"{BEST} loses {change} of perplexity against its teacher", won=ratio < 1.1)


def _drafts(report: Mapping[str, Any]) -> Finding:
    if not report["lossless"]:
        return Finding("drafts changed the text", won=False)
    speedup = report["speedup"]
    if report["best_drafter"] == PLAIN:
        return Finding("no draft was worth a try, and decoding is no faster", won=False)
    if abs(speedup - 1) < SAME_SPEED:
        return Finding("drafts bring the same text, no faster on this machine", won=False)
    if speedup < 1:
        return Finding(f"drafts bring the same text, slower on this machine ({speedup:.2f} times as fast)", won=False)
    return Finding(f"drafts bring the same text {speedup:.2f} times as fast", won=True)


def _augmentation(bare: float, augmented: float) -> Finding:
    figures = f"{augmented:.3f} times its perplexity, {BARE} {bare:.3f}"
    if augmented < bare - SAME_QUALITY:
        return Finding(f"the augmented attention is nearer to the teacher than a plain linear one: {figures}", won=True)
    text = f"the augmented attention is no nearer to the teacher than a plain linear one: {figures}"
    return Finding(text, won=False)


def _memory(ratio: float, name: str, alone: float) -> Finding:
    figures = f"{ratio:.3f} times the teacher's perplexity, a {name}, {alone:.3f}"
    if ratio < alone - SAME_QUALITY:
        return Finding(f"the memory makes up for what a window alone loses: {figures}", won=True)
    return Finding(f"the trained memory is no better than the window alone: {figures}", won=False)


def _softmax(report: Mapping[str, Any]) -> Finding:
    softmax = report["softmax_tokens_per_second"]
    ratio = report["speculative_tokens_per_second"] / softmax
    plain = report["plain_tokens_per_second"] / softmax
    figures = f"{ratio:.2f} times with drafts, {plain:.2f} times without"
    if ratio > 1 + SAME_SPEED:
        return Finding(f"the linear model decodes short texts faster than its softmax teacher: {figures}", won=True)
    return Finding(f"the linear model decodes short texts no faster than its softmax teacher: {figures}", won=False)


def _context(context: Mapping[str, Any]) -> list[Finding]:
    """Compares linear and softmax at the longest text that both have read."""
    linear, softmax = context["linear"], context["softmax"]
    both = [n for n, each in enumerate(softmax["milliseconds"]) if each is not None]
    if not both:
        return []
    place, length = both[-1], context["lengths"][both[-1]]
    time = softmax["milliseconds"][place] / linear["milliseconds"][place]
    state = softmax["state_bytes"][place] / linear["state_bytes"][place]
    figures = f"softmax takes {time:.2f} times as long for a token, and keeps {state:.1f} times as many bytes"
    if time > 1 + SAME_SPEED:
        return [Finding(f"after {length:,} tokens the linear model is faster: {figures}", won=True)]
    return [Finding(f"after {length:,} tokens the linear model is no faster: {figures}", won=False)]
