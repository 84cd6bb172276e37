import json
import os
import socket
import subprocess
import sys

from support.processes import IMPORTED, ROOT
from support.shared_state import METADATA, state_of, whole

from lin_jax.training.checkpoint.files import problem, saved_steps
from lin_jax.training.checkpoint.manager import Checkpoints


def together(count, *arguments):
    """What processes of one job print, each line as JSON, and what they say on stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # One process must not read a program that another is writing.
    environment = os.environ | {"PYTHONPATH": IMPORTED, "JAX_ENABLE_COMPILATION_CACHE": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, ROOT / "tests/support/shared_state.py", *map(str, (port, count, index, *arguments))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(count)
    ]
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * count, said
    lines = [[line for line in out.splitlines() if line.startswith("{")] for out, _ in said]
    return [[json.loads(line) for line in each] for each in lines], [errors for _, errors in said]


def test_one_process_and_two_restore_what_the_other_saved(tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    with Checkpoints(alone) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state_of(step), {"read": step}, METADATA)
    damaged = next((alone / "checkpoints" / "3" / "model").rglob("d/*"))
    damaged.write_bytes(damaged.read_bytes()[:-1])

    printed, errors = together(2, alone, shared)
    for found in printed:
        assert [each["step"] for each in found] == [2, 1]
        assert [each["data"] for each in found] == [{"read": 2}, {"read": 1}]
        assert [each["whole"] for each in found] == [whole(state_of(2)), whole(state_of(1))]
        assert [each["shard"] for each in found] == [[2, 4], [2, 4]]
    # The first process speaks and moves; the second does as the first.
    assert "checkpoints/3 cannot be read, trying the one before" in errors[0]
    assert "cannot be read" not in errors[1]
    assert saved_steps(alone) == [1]
    assert (alone / "unreadable" / "3").exists()
    assert (alone / "rolled_back" / "2").exists()

    assert saved_steps(shared) == [4, 5]
    assert problem(shared / "checkpoints" / "5") is None
    with Checkpoints(shared) as checkpoints:
        restored = checkpoints.restore_latest(state_of(0), METADATA)
    assert (restored.step, restored.data) == (5, {"read": 5, "by": 0})
    assert whole(restored.state) == whole(state_of(5))
    assert len(restored.state.params["w"].sharding.device_set) == 1
