"""How much memory a run has needed so far."""

import resource
import sys

import jax


def peak_memory() -> int:
    """Bytes: the most that any device of this process has held; on a CPU, the most of the process itself."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if each and "peak_bytes_in_use" in each]
    return max(peaks) if peaks else _resident()


def _resident() -> int:
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest
