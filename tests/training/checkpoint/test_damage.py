import errno
import hashlib
import json
import logging
import random
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.shared_state import METADATA, state_of, whole

from lin_jax.errors import UserError
from lin_jax.training.checkpoint import manager as module
from lin_jax.training.checkpoint.files import MODEL_PARTS, problem, saved_steps
from lin_jax.training.checkpoint.manager import Checkpoints
from lin_jax.training.checkpoint.manifest import MANIFEST_FILE, damage, seal

PARTS = ("model", "optimizer", "key", "watch", "data", "about")

STAMPS = {"_CHECKPOINT_METADATA", "commit_success.txt"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A run with checkpoints of steps 1 to 4."""
    folder = tmp_path_factory.mktemp("sound")
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, state_of(step), {"read": step}, METADATA)
    return folder


@pytest.fixture
def run(sound, tmp_path):
    """That run, to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "run"))


def files(folder):
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


def flip(path, chance):
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def restored_step(run):
    with Checkpoints(run) as checkpoints:
        restored = checkpoints.restore_latest(state_of(0), METADATA)
    assert whole(restored.state) == whole(state_of(restored.step))
    assert restored.data == {"read": restored.step}
    return restored.step


def test_the_manifest_lists_every_file_with_its_checksum(sound):
    folder = sound / "checkpoints" / "4"
    listed = json.loads((folder / MANIFEST_FILE).read_text())["files"]
    assert set(listed) == set(files(folder)) - STAMPS - {MANIFEST_FILE}
    for name, (size, checksum) in listed.items():
        content = (folder / name).read_bytes()
        assert (size, checksum) == (len(content), hashlib.blake2b(content, digest_size=16).hexdigest())
    assert damage(folder) is None


def test_any_damage_to_any_file_is_found(sound, tmp_path):
    chance = random.Random(0)
    folder = Path(shutil.copytree(sound / "checkpoints" / "4", tmp_path / "4"))
    names = set(files(folder)) - STAMPS
    assert {name.split("/")[0] for name in names} == {*PARTS, MANIFEST_FILE}
    for name in sorted(names):
        path, content = folder / name, (folder / name).read_bytes()
        for _ in range(10):
            flip(path, chance)
            assert problem(folder) is not None, name
            path.write_bytes(content)
        path.write_bytes(content[: chance.randrange(len(content))])
        assert problem(folder) is not None, name
        path.write_bytes(content + b"\0")
        assert problem(folder) is not None, name
        path.unlink()
        assert problem(folder) is not None, name
        path.write_bytes(content)
    assert problem(folder) is None


def test_only_what_is_read_must_be_whole(run):
    folder = run / "checkpoints" / "4"
    shutil.rmtree(folder / "optimizer")
    assert problem(folder, MODEL_PARTS) is None
    assert "optimizer/" in problem(folder)


def test_a_flipped_bit_in_an_array_is_never_resumed_from(run, caplog):
    """Orbax reads most of such checkpoints without a word: what is in them is compared with nothing."""
    chance = random.Random(1)
    largest = max(files(run / "checkpoints" / "4" / "optimizer").values(), key=lambda path: path.stat().st_size)
    flip(largest, chance)
    with caplog.at_level(logging.WARNING):
        assert restored_step(run) == 3
    assert "checkpoints/4 cannot be read, trying the one before: optimizer/" in caplog.text
    assert "does not have its checksum" in caplog.text
    assert (run / "unreadable" / "4").exists()
    assert saved_steps(run) == [1, 2, 3]
    # Again at the same step: the older one in the folder is not overwritten.
    with Checkpoints(run) as checkpoints:
        checkpoints.save(4, state_of(4), {"read": 4}, METADATA)
    (run / "checkpoints" / "4" / MANIFEST_FILE).unlink()
    assert restored_step(run) == 3
    assert (run / "unreadable" / "4.1").exists()


def test_several_damaged_ones_in_a_row(run, caplog):
    shutil.rmtree(run / "checkpoints" / "4" / "data")
    flip(run / "checkpoints" / "3" / "key" / "metadata", random.Random(2))
    (run / "checkpoints" / "2" / MANIFEST_FILE).write_text("{}")
    assert restored_step(run) == 1
    for step in (4, 3, 2):
        assert f"checkpoints/{step} cannot be read" in caplog.text


def test_what_orbax_stamps_last_matters_to_nothing(run, caplog):
    for name in STAMPS:
        (run / "checkpoints" / "4" / name).write_bytes(b"[\xff")
    (run / "checkpoints" / "3" / "_CHECKPOINT_METADATA").write_text('{"commit_timestamp_nsecs": "x"}')
    assert restored_step(run) == 4
    assert caplog.text == ""


def test_one_that_was_deleted_halfway_is_not_used(run):
    folder = run / "checkpoints" / "4"
    (folder / MANIFEST_FILE).unlink()
    for path in (folder / "about").iterdir():
        path.unlink()
    assert restored_step(run) == 3


def test_one_of_a_time_before_manifests_is_read(run, caplog):
    folder = run / "checkpoints" / "4"
    (folder / MANIFEST_FILE).unlink()
    label = json.loads((folder / "about" / "metadata").read_text())
    del label["sealed"], label["validation_loss"]
    (folder / "about" / "metadata").write_text(json.dumps(label))
    assert restored_step(run) == 4
    assert caplog.text == ""
    # Nothing tells whether it is whole but the attempt to read it.
    shutil.rmtree(folder / "model")
    assert restored_step(run) == 3
    assert "checkpoints/4 cannot be read, trying the one before" in caplog.text


def test_a_whole_one_that_does_not_fit_is_not_passed_over(run):
    like = replace(state_of(0), optimizer={"other": state_of(0).step})
    with Checkpoints(run) as checkpoints, pytest.raises(UserError, match=r"/4 is whole, but cannot be read into this"):
        checkpoints.restore_latest(like, METADATA)
    assert saved_steps(run) == [1, 2, 3, 4]


def test_a_foreign_folder_is_no_checkpoint(tmp_path, caplog):
    (tmp_path / "checkpoints" / "7" / "weights").mkdir(parents=True)
    (tmp_path / "checkpoints" / "7" / "weights" / "data").write_bytes(b"x")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        checkpoints.restore_latest(state_of(0), METADATA)
    assert "7 cannot be read, trying the one before: it has no manifest.json" in caplog.text
    assert (tmp_path / "checkpoints" / "7" / "weights" / "data").exists()


def test_a_checkpoint_has_its_manifest_before_its_name(tmp_path, monkeypatch):
    begun, go = threading.Event(), threading.Event()

    def slow(folder):
        seal(folder)
        begun.set()
        assert go.wait(60)

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1), {}, METADATA)
        checkpoints.wait()
        monkeypatch.setattr(module, "seal", slow)
        # Training goes on while the manifest is written.
        checkpoints.save(2, state_of(2), {}, METADATA)
        assert begun.wait(60)
        assert saved_steps(tmp_path) == [1]
        # What a kill leaves at this moment.
        shutil.copytree(tmp_path, tmp_path / "killed")
        go.set()
    assert saved_steps(tmp_path) == [1, 2]
    assert problem(tmp_path / "checkpoints" / "2") is None
    with Checkpoints(tmp_path / "killed") as checkpoints:
        assert checkpoints.restore_latest(state_of(0), METADATA).step == 1
        checkpoints.save(2, state_of(2), {}, METADATA)
    assert sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()) == ["1", "2"]


def test_a_manifest_that_cannot_be_written_makes_no_checkpoint(tmp_path, monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1), {"read": 1}, METADATA)
        checkpoints.wait()
        monkeypatch.setattr(module, "seal", full)
        checkpoints.save(2, state_of(2), {}, METADATA)
        with pytest.raises(UserError, match=r"No space left on device; the last good checkpoint is .*checkpoints/1;"):
            checkpoints.wait()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert restored_step(tmp_path) == 1


def test_saved_arrays_are_placed_as_the_ones_asked_for(run):
    with Checkpoints(run) as checkpoints:
        own = checkpoints.restore_latest(state_of(0), METADATA).state
    np.testing.assert_array_equal(own.params["w"], state_of(4).params["w"])
    assert own.step.sharding == state_of(0).step.sharding
    assert own.key.sharding == state_of(0).key.sharding
