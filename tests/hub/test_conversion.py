"""Conversions block by block: the bytes of a conversion in memory, and interrupted ones that go on or leave nothing."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from support.cells import cells
from support.exported import Case

from lin_jax.errors import UserError
from lin_jax.hub import from_pretrained, save_pretrained
from lin_jax.hub.conversion import blocks, unfinished
from lin_jax.hub.conversion.convert import convert, converted_bytes
from lin_jax.hub.conversion.tensor_file import StreamedTensor, file_sha256, write_file
from lin_jax.hub.files import read_tensors
from lin_jax.hub.load import Pretrained
from lin_jax.hub.medusa import load_medusa_heads
from lin_jax.hub.peft import load_adapters, save_adapters
from lin_jax.hub.tensors import without_copy
from lin_jax.models import MedusaHeads
from lin_jax.models.lora import adapters, add_lora, merge_lora

SHARD = 6000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA with softmax in several files, with heads."""
    model = Case("softmax").model("float32")
    heads = MedusaHeads.on(model, 2)
    return save_pretrained(model, tmp_path_factory.mktemp("source") / "llama", heads=heads, max_shard_bytes=20_000)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_file_has_the_bytes_of_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    arrays = {
        "b": draw.normal(size=(5, 7)).astype(np.float32),
        "a": draw.normal(size=(3, 4)).astype(ml_dtypes.bfloat16),
        "long.name.ä": draw.normal(size=11),
        "empty": np.empty((0, 3), np.float32),
        "number": np.array(2.5, np.float32),
        "half": draw.normal(size=9).astype(np.float16),
        "bytes": draw.integers(-9, 9, (2, 3)).astype(np.int8),
    }
    save_file(arrays, tmp_path / "right", metadata={"format": "pt"})
    monkeypatch.setattr(blocks, "BLOCK", 4)
    said: list[int] = []
    streamed = {
        name: StreamedTensor(array.shape, array.dtype, lambda array=array: blocks.blocks_of(array))
        for name, array in arrays.items()
    }
    checksum = write_file(streamed, tmp_path / "ours", said.append)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "right").read_bytes()
    assert checksum == file_sha256(tmp_path / "right")
    assert sum(said) == sum(array.nbytes for array in arrays.values())
    for name, tensor in read_tensors([tmp_path / "ours"]).items():
        assert np.array_equal(blocks.whole(tensor), arrays[name])
        joined = np.concatenate([*blocks.blocks_of(tensor), arrays[name].ravel()[:0]])
        assert np.array_equal(joined, arrays[name].ravel())


@pytest.mark.parametrize(
    ("attention", "dtype"),
    cells(
        [("augmented", "bfloat16"), (None, None)],
        [("linformer+local+convolution", "float32"), ("performer+local", None), (None, "bfloat16")],
    ),
    ids=str,
)
def test_the_bytes_of_a_conversion_in_memory(
    attention: str | None, dtype: str | None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 100)
    options: dict[str, Any] = {"max_shard_bytes": SHARD, "base": "llama", "figures": {"loss": 1.5}}
    model = from_pretrained(source, attention=attention, param_dtype=dtype, seed=3)
    heads, raw = load_medusa_heads(source, model), json.loads((source / "config.json").read_text())
    right = save_pretrained(model, tmp_path / "right/out", heads=heads, source=raw, **options)

    opened, written = Pretrained.open(source, attention=attention, param_dtype=dtype), []
    size = converted_bytes(opened)
    found = convert(opened, tmp_path / "ours/out", seed=3, note=written.append, **options)
    assert content(found) == content(right)
    assert len(list(found.glob("model-*"))) > 1
    assert (
        sum(written)
        == size
        == sum(load.nbytes for file in found.glob("*.safetensors") for load in load_file(file).values())
    )
    assert os.listdir(tmp_path / "ours") == ["out"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_are_merged_as_in_memory(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, also where layers have other ranks; GPT-2 stores its kernels as they are, LLaMA transposed."""
    monkeypatch.setattr(blocks, "BLOCK", 100)
    model = Case("softmax", family).model("float32")
    base = save_pretrained(model, tmp_path / "base")
    add_lora(model, 3, 6.0, rngs=nnx.Rngs(0))
    draw = np.random.default_rng(1)
    for adapter in adapters(model).values():
        part = adapter.update.lora_b
        part[...] = jnp.asarray(draw.normal(size=part.shape), part.dtype)
    save_adapters(model, tmp_path / "lora", base="base")

    held = from_pretrained(base)
    load_adapters(held, tmp_path / "lora")
    merge_lora(held)
    raw = json.loads((base / "config.json").read_text())
    right = save_pretrained(held, tmp_path / "right/out", source=raw)
    found = convert(Pretrained.open(base), tmp_path / "ours/out", adapter=tmp_path / "lora")
    assert content(found) == content(right)
    assert (found / "model.safetensors").read_bytes() != (base / "model.safetensors").read_bytes()


class Interrupted(BaseException):
    """Ends a conversion in the middle."""


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Lets some files of tensors be written, and ends the next one with an error behind its first bytes."""

    def install(files: int, error: BaseException | None = None) -> list[str]:
        names: list[str] = []

        def writing(tensors: Any, path: Path, note: Any) -> str:
            if len(names) == files and error is not None:
                path.write_bytes(b"half")
                raise error
            names.append(path.name)
            return write_file(tensors, path, note)

        monkeypatch.setattr(unfinished, "write_file", writing)
        return names

    return install


def converted(source: Path, out: Path, **options: Any) -> Path:
    return convert(Pretrained.open(source), out, max_shard_bytes=SHARD, **options)


@pytest.mark.parametrize("exists", [False, True])
def test_an_interrupted_conversion_goes_on(
    exists: bool, source: Path, stopped: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    right, out = content(converted(source, tmp_path / "right/out")), tmp_path / "ours/out"
    out.parent.mkdir()
    if exists:
        out.mkdir()
    stopped(3, Interrupted())
    with pytest.raises(Interrupted):
        converted(source, out)
    place = out / ".unfinished" if exists else out.parent / ".out.unfinished"
    assert f"interrupted: what is finished is kept in {place}; the same command goes on" in caplog.text
    assert len(list(place.glob("*.safetensors"))) == 3
    assert not list(place.glob("*.part"))
    assert out.exists() == exists

    # One of the finished files has lost a bit since.
    first = sorted(place.glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:-1] + b"\0")
    (place / "stray.part").write_text("")
    written, names = [], stopped(99)
    assert content(converted(source, out, note=written.append)) == right
    assert f"{first} is not what was written; it is made anew" in caplog.text
    assert len(names) == len([name for name in right if name.endswith(".safetensors")]) - 2
    assert sum(written) == converted_bytes(Pretrained.open(source))
    assert os.listdir(out.parent) == ["out"]


def test_another_command_starts_anew(source: Path, stopped: Any, tmp_path: Path) -> None:
    stopped(2, Interrupted())
    with pytest.raises(Interrupted):
        converted(source, tmp_path / "out")
    names = stopped(99)
    found = convert(Pretrained.open(source, param_dtype="bfloat16"), tmp_path / "out", max_shard_bytes=SHARD)
    assert len(names) == len(list(found.glob("*.safetensors")))
    assert from_pretrained(found).config.param_dtype == "bfloat16"


def test_a_full_disk(source: Path, stopped: Any, tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    stopped(0, full)
    with pytest.raises(UserError, match="out: No space left on device; give another folder"):
        converted(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    stopped(2, full)
    with pytest.raises(UserError, match=r"No space left on device; what is finished is kept in .* the same command"):
        converted(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [".out.unfinished"]


def test_one_at_a_time(source: Path, tmp_path: Path) -> None:
    with unfinished.resumable_folder(tmp_path / "out", "one", overwrite=False) as first:
        (first.path / "mine").write_text("precious")
        with pytest.raises(UserError, match=r"another process is writing .*; wait for it, or give another folder"):
            converted(source, tmp_path / "out")
        assert (first.path / "mine").read_text() == "precious"


def test_no_number_that_is_none(source: Path, tmp_path: Path) -> None:
    model = from_pretrained(source)
    model.norm.scale[...] = model.norm.scale[...].at[3].set(np.nan)
    broken = save_pretrained(model, tmp_path / "broken")
    with pytest.raises(UserError, match=r"model\.norm.weight holds NaN or infinity as float32"):
        converted(broken, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_overwriting(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(UserError, match="is not empty; give another folder, or --overwrite"):
        converted(source, out)
    converted(source, out, overwrite=True)
    assert not (out / "old").exists()
    first, second = from_pretrained(source), from_pretrained(out)
    for (path, one), (_, other) in zip(
        nnx.to_flat_state(nnx.state(first)), nnx.to_flat_state(nnx.state(second)), strict=True
    ):
        assert np.array_equal(one[...], other[...]), path


def test_a_copy_is_found_out_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 3)
    numbers = np.arange(20, dtype=np.float32).reshape(5, 4)
    save_file({"a": numbers, "b": numbers.copy(), "c": numbers + (numbers == 19)}, tmp_path / "file")
    tensors = read_tensors([tmp_path / "file"])
    assert set(without_copy(tensors, "b", "a")) == {"a", "c"}
    assert set(without_copy(tensors, "c", "a")) == {"a", "b", "c"}
