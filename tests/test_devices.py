"""Devices by name, and platforms that are not there."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from support.processes import ROOT

from lin_jax import devices
from lin_jax.devices import (
    cpu_model,
    device_kind,
    devices_shown,
    instruction_set,
    machine_flags,
    machine_key,
    parse_cpu_info,
)

SCRIPT = """
from lin_jax.devices import devices_shown
from lin_jax.errors import exit_cleanly

exit_cleanly(devices_shown)
"""

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Kilobytes of memory before and after, and of huge pages.
KEEPS = """
import ctypes
from lin_jax.devices import keep_freed_memory

def kilobytes(name):
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name)))

keep_freed_memory()
library, size = ctypes.CDLL(None), 64 * 2**20
library.malloc.restype, library.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
before = kilobytes("Rss")
block = library.malloc(ctypes.c_size_t(size))
ctypes.memset(block, 1, size)
library.free(block)
print(before, kilobytes("Rss"), kilobytes("AnonHugePages"))
"""


def test_devices_are_named() -> None:
    assert device_kind() in devices_shown()
    assert (len(jax.devices()) == 1) == (devices_shown() == device_kind())
    if jax.default_backend() == "cpu":
        assert device_kind().startswith(f"cpu, {cpu_model()}, ")
        assert device_kind().endswith(f", {len(os.sched_getaffinity(0))} processors")
        assert instruction_set() in device_kind()
        assert machine_flags() or not Path("/proc/cpuinfo").exists()


ZEN3 = """processor	: 0
vendor_id	: AuthenticAMD
model name	: AMD EPYC 7763 64-Core Processor
flags		: fpu smep sse4_2 fma avx avx2 bmi2

processor	: 1
model name	: another
flags		: avx512f
"""
GRAVITON = """processor	: 0
Features	: fp asimd sve i8mm bf16
CPU implementer	: 0x41
CPU part	: 0xd40
"""


def test_processors_are_named_by_model_and_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_cpu_info(ZEN3)[0] == "AMD EPYC 7763 64-Core Processor"
    assert parse_cpu_info("model name : Intel(R) Xeon(R)  Processor\n")[0] == "Intel Xeon Processor"
    assert parse_cpu_info(GRAVITON)[0] == "ARM 0x41 0xd40"
    assert parse_cpu_info("") == ("", frozenset())
    if jax.default_backend() != "cpu":
        pytest.skip("the other names are those of a CPU")
    keys = set()
    for text, family, flags in (
        (ZEN3, "AVX2", "avx avx2 bmi2 fma sse4_2"),
        (ZEN3.replace("avx2", "avx2 avx512f avx512bw avx512dq avx512vl"), "AVX-512", None),
        (GRAVITON, "SVE", "asimd bf16 i8mm sve"),
        (None, "", ""),
    ):
        file = tmp_path / "cpuinfo"
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        monkeypatch.setattr(devices, "CPU_INFO", file)
        devices._cpu_info.cache_clear()
        assert instruction_set() == family
        assert flags in (None, machine_flags())
        assert cpu_model()
        keys.add(machine_key())
    devices._cpu_info.cache_clear()
    assert len(keys) == 4


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_platform_that_is_not_there(platform: str) -> None:
    if platform == "cuda" and jax.default_backend() == "gpu":
        pytest.skip("it is there")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"JAX_PLATFORMS": platform, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines[-1].startswith(f"error: JAX cannot use the platform {platform} here (")
    assert "Traceback" not in done.stderr
    assert len(lines) == 1


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text() or platform.libc_ver()[0] != "glibc",
    reason="no huge pages here",
)
def test_freed_memory_is_kept_and_lies_in_huge_pages() -> None:
    """Sixty megabytes that are written to and freed stay with the process, most of them in large pages."""
    done = subprocess.run(
        [sys.executable, "-c", KEEPS], capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 0, done.stderr
    small, kept, huge = map(int, done.stdout.split())
    assert kept - small > 60_000
    assert huge > 30_000 or "[madvise]" not in HUGE_PAGES.read_text()
