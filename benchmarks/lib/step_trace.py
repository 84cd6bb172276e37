"""Time that each part of a training step takes, from a trace of its compiled program.

Operations of the program are named in the trace; the program's text says which line of which function each was made
for, and so which part of the model it belongs to. Forward and backward are told apart by the name that JAX gives to
what it transposes.
"""

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

# Part of a step by a function or file on the stack of an operation; the first that is found, innermost frame first.
PARTS = (
    ("feed-forward", ("LlamaFeedForward",)),
    ("rotary positions", ("rotary.py",)),
    ("norms", ("RMSNorm", "LayerNorm")),
    ("projections of attention", ("LlamaAttention.project", "LlamaAttention.merge")),
    ("attention", ("/attention/", "/pallas_kernels/")),
    ("cross entropy", ("/losses/cross_entropy.py",)),
    ("head", ("CausalModel.logits", "Llama.logits")),
    ("embedding", ("Embedding.__call__",)),
    ("optimiser", ("/optax/", "train_step.py", "spike_detection.py")),
    ("residual stream", ("prenorm_block.py",)),
)
_DEFINED = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = ")
_FUSED = re.compile(r"calls=%?([\w.\-]+)")


def traced_parts(run: Callable[[], Any], text: str, steps: int = 6) -> list[dict[str, Any]]:
    """Milliseconds of a step by part, the longest first.

    An operation counts with the least of its times, so that what else the machine does is left out; operations that run
    side by side count one by one, so the sum is not the step's time exactly.

    Args:
        run: one step, which waits until it is done.
        text: of the compiled program.
        steps: that are traced.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                run()
        (found,) = Path(folder).rglob("*.xplane.pb")
        times = operation_times(found, steps)
    parts = parts_of_operations(text)
    spent: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for name, seconds in times.items():
        part, backward, product = parts.get(name, ("copies and the rest", False, False))
        spent[part][("backward" if backward else "forward") + (", products" if product else "")] += 1e3 * seconds
    rows = [{"part": part, "ms": sum(each.values()), "split": dict(each)} for part, each in spent.items()]
    return sorted(rows, key=lambda row: -row["ms"])


def operation_times(path: Path, steps: int) -> dict[str, float]:
    """Seconds of each operation in a step."""
    each: dict[str, list[float]] = defaultdict(list)
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                if (name := dict(event.stats).get("hlo_op")) is not None:
                    each[str(name)].append(event.duration_ns / 1e9)
    # An operation of a loop's body runs several times a step.
    return {name: min(spans) * len(spans) / steps for name, spans in each.items()}


def parts_of_operations(text: str) -> dict[str, tuple[str, bool, bool]]:
    """Part of each operation of a program, whether it belongs to the backward pass, and whether it has a product.

    Args:
        text: of the compiled program, with its tables of stack frames.
    """
    stacks, products, inside = _stacks(text), set(), ""
    found = {}
    for line in text.splitlines():
        if line.endswith("{") and " = " not in line.partition("(")[0]:
            inside = line.removeprefix("ENTRY ").lstrip("%").partition(" ")[0]
        if (defined := _DEFINED.match(line)) is None:
            continue
        if " dot(" in line:
            products.add(inside)
        calls = _FUSED.search(line)
        product = " dot(" in line or (calls is not None and calls.group(1) in products)
        stack = re.search(r"stack_frame_id=(\d+)", line)
        part = stacks.get(int(stack.group(1)), "copies and the rest") if stack else "copies and the rest"
        found[defined.group(1)] = part, "transpose(jvp" in line, product
    return found


def _stacks(text: str) -> dict[int, str]:
    """Part of a step for each stack frame of a program."""
    names, functions = (
        {int(at): name for at, name in re.findall(r'^(\d+) "(.*)"$', table, re.M)}
        for table in (_table(text, "FileNames"), _table(text, "FunctionNames"))
    )
    located = re.findall(r"(\d+) \{file_name_id=(\d+) function_name_id=(\d+)", _table(text, "FileLocations"))
    places = {at: f"{names[int(file)]} {functions[int(function)]}" for at, file, function in located}
    stacked = re.findall(r"(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)", _table(text, "StackFrames"))
    # Zero is none; the number of the outer frame is one less.
    frames = {int(at): (places[place], int(parent) - 1) for at, place, parent in stacked}

    def part(frame: int) -> str:
        while frame:
            place, frame = frames[frame]
            for name, words in PARTS:
                if any(word in place for word in words):
                    return name
        return "copies and the rest"

    return {frame: part(frame) for frame in frames}


def _table(text: str, name: str) -> str:
    """The lines of one of the tables at a program's head."""
    begin = text.index(f"\n{name}\n") + len(name) + 2
    return text[begin : text.index("\n\n", begin)]
