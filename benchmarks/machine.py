"""Machine at hand for other benchmarks: device, versions, and what they need that is missing; the status is 1 then.

python benchmarks/machine.py [--platform gpu] [--json FILE]
"""

import argparse
import importlib
import importlib.metadata
import os
import shutil
import subprocess
from typing import Any

import jax
import jax.numpy as jnp
from lib.report import header, write

from lin_jax.errors import OptionParser, exit_cleanly

# What benchmarks and marked tests import, by platform.
NEEDED = {
    "cpu": ("lin_jax.api", "lin_jax.training", "lin_jax.session", "pallas_kernels.tune", "pytest"),
    "gpu": ("lin_jax.api", "lin_jax.training", "lin_jax.session", "pallas_kernels.tune", "pytest", "triton"),
}
# What is of use, and left out by benchmarks where it is not there.
WANTED = ("fla", "torch", "xdist")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "triton", "jax-triton", "torch", "flash-linear-attention", "fla-core")


def main() -> int:
    """Looks, prints, and writes JSON if asked to."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", choices=tuple(NEEDED), default=jax.default_backend(), help="that is expected")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to a file, or print it")
    options = parser.parse_args()
    missing = [why for name in NEEDED[options.platform] if (why := trouble(name)) is not None]
    if jax.default_backend() != options.platform:
        missing.append(f"JAX runs on {jax.default_backend()}, not on {options.platform}")
    if options.platform == "gpu":
        missing += kernels_missing()
    report = header("machine") | {
        "cores": len(os.sched_getaffinity(0)),
        "driver": driver(),
        "versions": {name: version(name) for name in PACKAGES},
        "missing": missing,
        "left_out": [why for name in WANTED if (why := trouble(name)) is not None],
        "answer": float(jnp.sum(jnp.ones(3))),
    }
    print(f"{report['device']}, {report['cores']} cores, {report['driver']}")
    print(", ".join(f"{name} {found}" for name, found in report["versions"].items() if found))
    for kind in ("left_out", "missing"):
        for each in report[kind]:
            print(f"{kind.replace('_', ' ')}: {each}")
    if options.json is not None:
        write(report, options.json)
    return 1 if missing else 0


def trouble(name: str) -> str | None:
    """The reason why a module cannot be imported; None if it can."""
    try:
        importlib.import_module(name)
    except Exception as problem:
        return f"{name}: {type(problem).__name__}: {' '.join(str(problem).split())[:300]}"
    return None


def kernels_missing() -> list[str]:
    """The reason why Triton kernels cannot be launched, if there is one."""
    from pallas_kernels.gpu.launch import obstacle

    found: Any = obstacle("augmented_attention.outputs", 64, 64, jnp.bfloat16, interpret=False)
    return [] if found is None else [f"Triton kernels: {found}"]


def driver() -> str:
    """The GPU and its driver, by nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi"
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip().replace("\n", "; ")


def version(name: str) -> str | None:
    """Version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    exit_cleanly(main)
