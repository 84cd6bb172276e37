"""TPUs that need not be there: the compiler of real ones says what a program would hold and do.

Import it before jax. It needs the package libtpu (`make test` puts it into .venv/libtpu).
"""

import os
import sys
from pathlib import Path

COMPILER = Path(sys.prefix) / "libtpu"
# A process without a TPU must not look for one; the compiler is found beside jax.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    # Compilers may run side by side; only a TPU belongs to one process.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
sys.path.append(str(COMPILER))

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from lin_jax.errors import UserError  # noqa: E402


def chips_of(topology: str) -> list[jax.Device]:
    """All chips of a topology such as v5e:16x16."""
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as problem:
        raise UserError(f"no chips like '{topology}': {str(problem).splitlines()[0]}; is libtpu installed?") from None
