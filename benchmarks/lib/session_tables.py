"""Reports of a session's parts in Markdown; a report may be that of a part that was stopped half-way."""

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

PASSES = ("forward", "forward_and_backward")
FLA = "flash-linear-attention"


def machine_table(report: Any) -> list[str]:
    """The device, its driver and the versions."""
    versions = ", ".join(f"{name} {found}" for name, found in report["versions"].items() if found)
    lines = [f"{report['device']}, {report['cores']} cores, {report['driver']}. {versions}, commit {report['commit']}."]
    return (
        lines + [f"* left out: {each}" for each in report["left_out"]] + [f"* missing: {m}" for m in report["missing"]]
    )


def kernels_table(report: Any) -> list[str]:
    """Milliseconds of operations by implementation, beside others, and how ours compare to the best of them."""
    lines = ["| operation | B,T,H,D | implementation | forward ms | and backward ms | of the roofline | error |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for each in report["results"]:
        where = f"| {each['operation']} | {each['shape']} |"
        if "failed" in each:
            lines.append(f"{where} failed: {each['failed'][:80].replace('|', '/')} | | | | |")
        for name, way in each["implementations"].items():
            if "forward" not in way:
                lines.append(f"{where} {name} | wrong | | | {way['error']:.1e} |")
                continue
            one, both = (way[label]["milliseconds"] for label in PASSES)
            shares = " / ".join(f"{100 * way[label]['share_of_roofline']:.0f}%" for label in PASSES)
            error = f"{way['error']:.1e}" if way.get("checked", True) else "-"
            lines.append(f"{where} {name} | {one:.3f} | {both:.3f} | {shares} | {error} |")
    return lines + _against_peers(report["results"])


def _against_peers(results: list[dict[str, Any]]) -> list[str]:
    """How many times as fast as flash-linear-attention the GPU's kernels are, forward and backward."""
    lines = []
    for operation in dict.fromkeys(each["operation"] for each in results):
        ways = [each["implementations"] for each in results if each["operation"] == operation]
        both = [way for way in ways if PASSES[1] in way.get("gpu", {}) and PASSES[1] in way.get(FLA, {})]
        ratios = [way[FLA][PASSES[1]]["milliseconds"] / way["gpu"][PASSES[1]]["milliseconds"] for way in both]
        if ratios:
            told = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            lines.append(
                f"* {operation}: {median(ratios):.2f} times {FLA} in the median, forward and backward ({told})"
            )
    return ["", *lines] if lines else []


def verify_table(report: Any) -> list[str]:
    """Milliseconds of verified trees."""
    lines = ["| attention | rows | nodes | implementation | ms | times one node | error |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for each in report["verify"]:
        spent = f"{each['milliseconds']:.3f}" if "milliseconds" in each else "wrong"
        times = f"{each['times_one_node']:.2f}" if "times_one_node" in each else ""
        head = f"| {each['attention']} | {each['batch']} | {each['nodes']} | {each['implementation']} |"
        lines.append(f"{head} {spent} | {times} | {each['error']:.1e} |")
    return lines


def train_table(report: Any) -> list[str]:
    """Tokens per second, share of the peak and of a product of two matrices, by length."""
    lines = ["| attention | tokens of a row | tokens/s | MFU | of a product | step s | compiled s |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for each in report["results"]:
        where = f"| {each['attention']} | {each.get('length', '')} |"
        if "step_seconds" not in each:
            lines.append(f"{where} {str(each.get('failed', 'wrong'))[:80].replace('|', '/')} | | | | |")
            continue
        mfu = "" if each.get("mfu") is None else f"{100 * each['mfu']:.1f}%"
        share = f"{100 * each['share_of_product']:.1f}%" if "share_of_product" in each else ""
        compiled = f"{each['compile_seconds']:.0f}" if "compile_seconds" in each else ""
        spent = f"{each['tokens_per_second']:,.0f} | {mfu} | {share} | {each['step_seconds']:.3f} | {compiled} |"
        lines.append(f"{where} {spent}")
    return lines


def drafting_table(report: Any) -> list[str]:
    """Speed and tokens a step, plain and with drafts, and what steps of more nodes cost."""
    lines = ["| kind | batch | way | tokens/s | times plain | tokens a step | rows equal |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for cell in report["cells"]:
        where = f"| {cell['kind']} | {cell['batch']} |"
        lines.append(f"{where} plain | {cell['plain']['tokens_per_second']:,.0f} | 1 | 1 | |")
        for each in cell["drafted"]:
            equal = f"{each['equal']} of {each['rows']}"
            if each["wrong"]:
                lines.append(f"{where} {each['shape']} | wrong | | | {equal} |")
                continue
            speed = f"{each['tokens_per_second']:,.0f} | {each['speedup']:.2f} | {each['mean_accepted_tokens']:.2f}"
            lines.append(f"{where} {each['shape']} | {speed} | {equal} |")
    for found in report.get("costs", ()):
        pairs = zip(found["nodes"], found["seconds"], strict=True)
        told = ", ".join(f"{nodes} nodes {1e3 * spent:.3f} ms" for nodes, spent in pairs)
        lines += ["", f"* {found['kind']}, batch {found['batch']}, a step of {told}"]
    return lines


def commit_table(report: Any) -> list[str]:
    """Time and errors of commits, and whether they end with the same bits again."""
    lines = ["| type | rows | implementation | us a commit | errors: calls, loop | same bits again |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for each in report["results"]:
        errors = ", ".join(f"{error:.1e}" for error in each["errors"].values())
        where = f"| {each['dtype']} | {each['batch']} | {each['implementation']} | {each['microseconds']:.1f} |"
        lines.append(
            f"{where} {errors}{'' if each['correct'] else ' WRONG'} | {'yes' if each['same_bits'] else 'NO'} |"
        )
    return lines


def tiles_rows(shipped: Path, after: Any) -> list[str]:
    """The rows that tuning has found, as `tiles.json` has them."""
    before = json.loads(shipped.read_text(encoding="utf-8"))
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for device, kernels in after.items():
        for kernel, rows in kernels.items():
            for name, row in rows.items():
                if row != before.get(device, {}).get(kernel, {}).get(name):
                    found.setdefault(device, {}).setdefault(kernel, {})[name] = row
    if not found:
        return ["No row is another than the shipped one."]
    # A line for each row, as in the table.
    text = re.sub(r"\{\s*([^{}]*?)\s*\}", lambda row: f"{{{' '.join(row[1].split())}}}", json.dumps(found, indent=2))
    return ["```json", *text.splitlines(), "```"]
