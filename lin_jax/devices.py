"""Devices that JAX runs on, by name: the one description of a machine that reports, plans and caches use."""

import ctypes
import hashlib
import os
import platform
import re
from functools import cache
from pathlib import Path

import jax

from lin_jax.errors import UserError

CPU_INFO = Path("/proc/cpuinfo")
# Families of instructions, the best first: name for people, and the flags that a processor must have.
INSTRUCTION_SETS = (
    ("AVX-512", ("avx512f", "avx512bw", "avx512dq", "avx512vl")),
    ("AVX2", ("avx2", "fma")),
    ("AVX", ("avx",)),
    ("SVE", ("sve",)),
    ("NEON", ("asimd",)),
)
# Flags of instructions that programs are compiled for; the others, such as those for virtual machines, do not matter.
_COMPILED_FOR = re.compile(r"(avx|amx|fma|f16c|bmi|sse4|sve|asimd|bf16|i8mm|sme\b)")

# Options of glibc's mallopt: free memory at the end of the heap that is kept (M_TRIM_THRESHOLD, two gigabytes), no
# blocks outside the heap (M_MMAP_MAX), and one heap, as those of threads are too small for such blocks (M_ARENA_MAX).
_KEPT_MEMORY = ((-1, 2**31 - 1), (-4, 0), (-8, 1))
# Bytes of the heap that are asked to lie in huge pages (MADV_HUGEPAGE): less than what is kept at its end.
_HUGE_PAGES, _ADVICE, _PAGE = 3 * 2**29, 14, 2**21


def device_kind() -> str:
    """Kind of device that JAX runs on; for a CPU its model, instruction set and number of processors.

    Raises:
        UserError: JAX cannot use the platform that the environment asks for.
    """
    device = _devices()[0]
    if device.platform == "cpu":
        words = (f"cpu, {cpu_model()}", instruction_set(), f"{len(os.sched_getaffinity(0))} processors")
        return ", ".join(filter(None, words))
    return device.device_kind


def devices_shown() -> str:
    """All devices in a phrase, such as `4 x NVIDIA H100`; errors as in `device_kind`."""
    count = len(_devices())
    return device_kind() if count == 1 else f"{count} x {device_kind()}"


def keep_freed_memory() -> None:
    """Lets this process keep memory that it frees, so that a training step on a CPU finds that of the last one.

    A step's program has its intermediate results in one block of some hundred megabytes. The C library gives blocks of
    this size back to the system and gets new ones, page by page, at every step: a fifth of the time of a small model's
    step. The memory is asked for in huge pages, too. Call it before JAX has begun to run anything; it does nothing
    where there is an accelerator, or another C library than glibc.
    """
    accelerator = any(next(Path("/dev").glob(pattern), None) for pattern in ("nvidia[0-9]*", "accel*", "kfd", "vfio"))
    if platform.libc_ver()[0] != "glibc" or (accelerator and os.environ.get("JAX_PLATFORMS") != "cpu"):
        return
    library = ctypes.CDLL(None)
    for option, value in _KEPT_MEMORY:
        library.mallopt(option, value)
    _ask_for_huge_pages(library)


def _ask_for_huge_pages(library: ctypes.CDLL) -> None:
    """Lets the system give the heap's memory out in pages of two megabytes, from the first use of each on.

    A step reads some hundred megabytes; looking their small pages up takes about 5% of its time.
    """
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    library.free.argtypes = (ctypes.c_void_p,)
    library.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    # Memory that is not written to is not there yet: this only extends the heap.
    if (begin := library.malloc(_HUGE_PAGES)) is None:
        return
    first = -(-begin // _PAGE) * _PAGE
    library.madvise(first, (begin + _HUGE_PAGES - first) // _PAGE * _PAGE, _ADVICE)
    library.free(begin)


def machine_flags() -> str:
    """Instructions of the CPU that programs are compiled for, in order; empty where JAX runs on another device."""
    if _devices()[0].platform != "cpu":
        return ""
    return " ".join(sorted(flag for flag in _cpu_info()[1] if _COMPILED_FOR.match(flag)))


def machine_key() -> str:
    """Short name for files that are of use on this kind of machine alone: programs, and costs of steps."""
    what = f"{device_kind()}\n{machine_flags()}\n{jax.__version__}"
    return hashlib.sha256(what.encode()).hexdigest()[:16]


def cpu_model() -> str:
    """Name of the CPU's model, by /proc/cpuinfo where there is one."""
    return _cpu_info()[0] or platform.processor() or platform.machine() or "unknown model"


def instruction_set() -> str:
    """Best family of vector instructions that the CPU has, such as AVX-512; empty if it is not known."""
    flags = _cpu_info()[1]
    return next((name for name, needed in INSTRUCTION_SETS if flags.issuperset(needed)), "")


@cache
def _cpu_info() -> tuple[str, frozenset[str]]:
    """Model and flags of the first processor; empty where the system does not tell."""
    try:
        return parse_cpu_info(CPU_INFO.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return "", frozenset()


def parse_cpu_info(text: str) -> tuple[str, frozenset[str]]:
    """Model and flags of the first processor of a /proc/cpuinfo; on ARM, which names no model, its part number.

    Args:
        text: content of the file.
    """
    first = text.strip().partition("\n\n")[0]
    lines = (line.partition(":") for line in first.splitlines())
    found = {name.strip().lower(): value.strip() for name, _, value in lines}
    model = found.get("model name") or found.get("cpu model") or ""
    if not model and "cpu part" in found:
        model = f"ARM {found.get('cpu implementer', '')} {found['cpu part']}".replace("  ", " ")
    model = re.sub(r"\((R|TM)\)", "", model, flags=re.IGNORECASE)
    return " ".join(model.split()), frozenset((found.get("flags") or found.get("features") or "").split())


def _devices() -> list[jax.Device]:
    try:
        return jax.devices()
    # A plugin that fails to load raises what it likes, assertions included.
    except (RuntimeError, AssertionError, ImportError) as error:
        asked = getattr(jax.config, "jax_platforms", None) or "the default"
        reason = next(iter(str(error).strip().splitlines()), "it finds no device")[:200].rstrip(". ")
        raise UserError(
            f"JAX cannot use the platform {asked} here ({reason}); install JAX for it, or unset JAX_PLATFORMS"
        ) from None
