"""Checkpoint folders: read tensor by tensor, and every way in which one can be broken said in one line."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import save_file

from lin_jax.errors import UserError
from lin_jax.hub.files import UNWANTED, WANTED, find_checkpoint, generation_ends, read_checkpoint, read_config

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write_shards(folder: Path, *shards: dict[str, np.ndarray], index: dict[str, str] | None = None) -> Path:
    for name, tensors in zip(SHARDS, shards, strict=False):
        save_file(tensors, folder / name)
    places = {tensor: name for name, tensors in zip(SHARDS, shards, strict=False) for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index or places}))
    return folder


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int64", "bool"])
def test_tensors_of_a_single_file(tmp_path: Path, dtype: str) -> None:
    """Shapes and types are known before anything is read; the bits are the file's."""
    array = np.arange(6).reshape(2, 3).astype(jnp.dtype(dtype))
    save_file({"a": array}, tmp_path / "model.safetensors")
    tensor = read_checkpoint(tmp_path)["a"]
    assert (tensor.shape, tensor.dtype, tensor.nbytes) == ((2, 3), array.dtype, array.nbytes)
    assert np.array_equal(np.asarray(tensor), array)


def test_tensors_of_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": np.ones(2)}, {"b": np.zeros(3), "c": np.full(1, 5.0)})
    tensors = read_checkpoint(tmp_path)
    assert {name: np.asarray(tensor).tolist() for name, tensor in tensors.items()} == {
        "a": [1, 1],
        "b": [0, 0, 0],
        "c": [5],
    }


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def broken(folder: Path, how: str) -> Path:
    a, b = {"a": np.ones(2)}, {"b": np.ones(3)}
    single = folder / "model.safetensors"
    if how == "shard missing":
        write_shards(folder, a, b)
        (folder / SHARDS[1]).unlink()
    elif how == "shard torn":
        truncate(write_shards(folder, a, b) / SHARDS[1])
    elif how == "tensor twice":
        write_shards(folder, a, a | b, index={"a": SHARDS[0], "b": SHARDS[1]})
    elif how == "tensor not in its shard":
        write_shards(folder, a, b, index={"a": SHARDS[0], "z": SHARDS[1]})
    elif how == "index empty":
        write_shards(folder, a)
        (folder / "model.safetensors.index.json").write_text("{}")
    elif how == "index torn":
        truncate(write_shards(folder, a) / "model.safetensors.index.json")
    elif how == "file torn":
        save_file(a, single)
        truncate(single)
    elif how == "pointer of git":
        single.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif how == "file empty":
        single.write_bytes(b"")
    elif how == "pickle":
        (folder / "pytorch_model.bin").write_bytes(b"never read")
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shard missing", f"lacks {SHARDS[1]}, of the 2 shards"),
        ("shard torn", f"{SHARDS[1]} is truncated or not a safetensors file"),
        ("tensor twice", f"a is in {SHARDS[0]} and in {SHARDS[1]}"),
        ("tensor not in its shard", f"names z, which {SHARDS[1]}"),
        ("index empty", "has no weight_map"),
        ("index torn", "cannot be read as JSON"),
        ("file torn", "is truncated or not a safetensors file"),
        ("pointer of git", "is truncated or not a safetensors file"),
        ("file empty", "is truncated or not a safetensors file"),
        ("pickle", "pytorch_model.bin, a pickle"),
        ("nothing", "holds no model.safetensors"),
    ],
)
def test_broken_folders(tmp_path: Path, how: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_checkpoint(broken(tmp_path, how))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no config.json"),
        ("{", "cannot be read as JSON"),
        ("[]", "does not hold a JSON object; restore it"),
    ],
)
def test_broken_configurations(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("said", "ends"), [(None, ()), ({}, ()), ({"eos_token_id": 2}, (2,)), ({"eos_token_id": [2, 5]}, (2, 5))]
)
def test_ends(tmp_path: Path, said: dict[str, Any] | None, ends: tuple[int, ...]) -> None:
    if said is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert generation_ends(tmp_path) == ends


class TestNames:
    """The Hub is asked for names that cannot be anything else, and never for pickles or code."""

    @pytest.fixture
    def asked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
        calls: list[tuple[str, list[str]]] = []

        def download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
            assert ignore_patterns == list(UNWANTED)
            calls.append((name, allow_patterns))
            if name == "nobody/nothing":
                raise OSError("404: no such repository.\nAnd a page about it")
            return str(tmp_path)

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        return calls

    @pytest.mark.parametrize("name", ["meta-llama/Llama-3.2-1B", "hub:owner/name.v1"])
    def test_fetched(self, name: str, asked: list[tuple[str, list[str]]], tmp_path: Path) -> None:
        assert find_checkpoint(name) == tmp_path
        [(fetched, patterns)] = asked
        assert fetched == name.removeprefix("hub:")
        assert "*.safetensors" in patterns
        assert not [pattern for pattern in patterns if pattern.endswith((".bin", ".py", "*"))]

    def test_what_is_fetched(self) -> None:
        """All of a model and its tokenizer, once; as the Hub's client chooses files."""
        wanted = ["config.json", "generation_config.json", "model-00001-of-00002.safetensors", "tokenizer.json"]
        wanted += ["model.safetensors.index.json", "chat_template.jinja", "merges.txt", "vocab.bpe", "spiece.model"]
        others = ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "onnx/config.json"]
        others += ["original/params.json", "model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors"]
        others += ["pytorch_model.bin", "modeling_own.py", "README.md", "tokenizer.pkl"]
        found = filter_repo_objects([*others, *wanted], allow_patterns=WANTED, ignore_patterns=UNWANTED)
        assert list(found) == wanted

    def test_folders_come_first(self, asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "owner" / "name").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert find_checkpoint("owner/name") == Path("owner/name")
        assert not asked

    @pytest.mark.parametrize("name", ["nowhere", "./runs/x", "/no/where", "a/b/c", "-x/y"])
    def test_other_words_are_folders(self, name: str, asked: list[Any]) -> None:
        with pytest.raises(UserError, match="there is no folder"):
            find_checkpoint(name)
        assert not asked

    def test_not_there(self, asked: list[Any]) -> None:
        with pytest.raises(
            UserError, match=r"cannot be fetched from the Hub: 404: no such repository; check the name$"
        ):
            find_checkpoint("nobody/nothing")
