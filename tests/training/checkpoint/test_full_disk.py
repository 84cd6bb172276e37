import logging
import resource
import subprocess
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from support.shared_state import METADATA, state_of, whole

from lin_jax.errors import UserError
from lin_jax.training.checkpoint.files import problem, saved_steps
from lin_jax.training.checkpoint.manager import Checkpoints
from lin_jax.training.checkpoint.storage import no_room, storage_failure
from lin_jax.training.monitoring.trackers import JsonLines, TensorBoard, read_metrics

# Numbers that no compression makes smaller: 2 MiB.
LARGE = 131072
ROOM = 5 * 2**20


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for two large states, or None where this process may not make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "none", folder], capture_output=True)
    if made.returncode:
        pytest.skip("a file system can only be made by root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def small_files(size):
    """Files larger than so many bytes cannot be written, as the system says at the write that is one too many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def small_state(step):
    state = state_of(step)
    return replace(state, optimizer={**state.optimizer, "large": state.params["w"]})


def large_state(step):
    return replace(
        small_state(step), optimizer={**state_of(step).optimizer, "large": state_of(step, LARGE).params["w"]}
    )


def fill(folder, make, message):
    """Saves two states and then large ones until one does not fit; leaving says nothing more of it."""

    def overflow():
        for step in range(3, 9):
            checkpoints.save(step, large_state(step), {"read": step}, METADATA)

    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make(step), {"read": step}, METADATA)
        checkpoints.wait()
        with pytest.raises(UserError, match=message) as stopped:
            overflow()
        assert "\n" not in str(stopped.value)


def assert_sound(folder, make, last):
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [str(last - 1), str(last)]
    assert [problem(folder / "checkpoints" / str(step)) for step in saved_steps(folder)] == [None, None]
    with Checkpoints(folder, keep=2) as checkpoints:
        restored = checkpoints.restore_latest(make(0), METADATA)
        assert restored.step == last
        assert whole(restored.state) == whole(make(last))
        # With room again, the run goes on.
        checkpoints.save(last + 1, small_state(last + 1), {"read": last + 1}, METADATA)
    assert saved_steps(folder) == [last, last + 1]


def test_a_full_disk_stops_the_run_with_a_line(small_disk, caplog):
    message = r"No space left on device; the last good checkpoint is .*/checkpoints/\d; make room and go on from it"
    fill(small_disk, large_state, message)
    assert caplog.text == ""
    assert_sound(small_disk, large_state, saved_steps(small_disk)[-1])


def test_files_that_may_not_grow_stop_the_run_with_a_line(tmp_path, caplog):
    with small_files(2**20):
        fill(
            tmp_path, small_state, r"File too large; the last good checkpoint is .*/checkpoints/2; make room and go on"
        )
    assert caplog.text == ""
    assert_sound(tmp_path, small_state, 2)


def test_an_unfinished_save_is_told_even_at_the_end(tmp_path):
    def run():
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, large_state(1), {}, METADATA)

    with (
        small_files(2**20),
        pytest.raises(UserError, match="the last good checkpoint is none; make room and start again"),
    ):
        run()
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_it_does_not_hide_what_stopped_the_run(tmp_path, caplog):
    def run():
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, large_state(1), {}, METADATA)
            raise KeyError("of the run")

    with small_files(2**20), caplog.at_level(logging.WARNING), pytest.raises(KeyError, match="of the run"):
        run()
    assert "File too large; the last good checkpoint is none" in caplog.text


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(
        UserError, match=r"cannot write to .*; the last good checkpoint is none; mend that and start again"
    ):
        Checkpoints(tmp_path)


def test_metrics_that_do_not_fit(tmp_path):
    def overflow(tracker):
        with small_files(2**12), checkpoints.full_disk_told():
            for step in range(1000):
                tracker.log(step, {"loss": 1.0})

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small_state(1), {}, METADATA)
        checkpoints.wait()
        for tracker in (JsonLines(tmp_path / "metrics.jsonl"), TensorBoard(tmp_path / "tensorboard")):
            with pytest.raises(UserError, match=r"too large; the last good checkpoint is .*/1;"):
                overflow(tracker)
            # Nothing is tried again, neither now nor when Python ends.
            tracker.close()
    whole_lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in whole_lines] == list(range(len(whole_lines)))
    resumed = JsonLines(tmp_path / "metrics.jsonl", resumed_at=20)
    resumed.log(21, {"loss": 1.0})
    resumed.close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(22))


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(FileNotFoundError), checkpoints.full_disk_told():
            (tmp_path / "none").read_text()
        with pytest.raises(ValueError, match="of the model"), checkpoints.full_disk_told():
            raise ValueError("of the model")


def test_what_failed_is_found_behind_what_was_raised():
    assert storage_failure(ValueError("RESOURCE_EXHAUSTED: Failed to write [os_error_code='28']")) == 28
    outer = RuntimeError("something")
    outer.__cause__ = FileNotFoundError(2, "No such file or directory")
    assert storage_failure(outer) == 2
    assert storage_failure(ValueError("anything")) is None
    assert no_room(28)
    assert not no_room(2)


def test_a_point_of_a_curve_is_as_the_library_writes_it(tmp_path):
    from tensorboardX import SummaryWriter
    from tensorboardX.proto.event_pb2 import Event

    curves, expected = (
        TensorBoard(tmp_path / "ours", resumed_at=4),
        SummaryWriter(str(tmp_path / "library"), purge_step=5),
    )
    for step, value in ((5, 1.5), (6, np.float32(1.25))):
        curves.log(step, {"loss": value, "a figure": 2})
        for name, number in (("loss", value), ("a figure", 2)):
            expected.add_scalar(name, number, step)
    curves.close()
    expected.close()

    def events(folder):
        content, found = next(folder.iterdir()).read_bytes(), []
        while content:
            size = int.from_bytes(content[:8], "little")
            found.append((content[8:12], Event.FromString(content[12 : 12 + size])))
            content = content[16 + size :]
        for _, event in found:
            event.wall_time = 0
        return found

    # The library's file says its version once more.
    assert events(tmp_path / "ours") == events(tmp_path / "library")[1:]
