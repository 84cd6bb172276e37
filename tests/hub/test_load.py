"""Whole folders: out and in again bit for bit, open to transformers, and never half read or half written."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from lin_jax.attention import REGISTRY, AttentionConfig
from lin_jax.data import Tokenizer, load_tokenizer
from lin_jax.errors import UserError
from lin_jax.hub import from_pretrained, save_pretrained
from lin_jax.hub.families.llama import entries
from lin_jax.hub.files import LazyTensor
from lin_jax.hub.medusa import load_medusa_heads, save_heads
from lin_jax.hub.model_card import model_card
from lin_jax.models import Llama, LlamaConfig, MedusaHeads
from lin_jax.models.params import abstract_model

SIZES = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 4}
GROUPS = {"group_size": 4, "kernel_size": 5, "rank": 2, "hashes": 3, "hash_bits": 2}
EVERY_NAME = [*REGISTRY, "augmented", "linformer+local+convolution", "performer+local"]


def config(name: str = "softmax", *, dtype: str = "float32", **options: Any) -> LlamaConfig:
    sizes = {**SIZES, "num_kv_heads": 2, **options}
    return LlamaConfig(**sizes, attention=AttentionConfig(name, **GROUPS), param_dtype=dtype, dtype=dtype)


def random_model(config: LlamaConfig, seed: int = 0) -> Llama:
    """Everything that is stored random, also what begins as a constant."""
    model, rng = abstract_model(config), np.random.default_rng(seed)
    state = nnx.state(model)
    for path, leaf in nnx.to_flat_state(state):
        drawn = np.arange(config.num_layers) if path[-1] == "layer" else rng.normal(0, 0.3, leaf.shape)
        leaf.set_value(jnp.asarray(drawn, leaf.dtype))
    nnx.update(model, state)
    return model


def variables(model: nnx.Module) -> dict[Any, np.ndarray]:
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def assert_equal(one: nnx.Module, other: nnx.Module) -> None:
    first, second = variables(one), variables(other)
    assert set(first) == set(second)
    for path, value in first.items():
        assert value.dtype == second[path].dtype, path
        assert np.array_equal(value, second[path]), path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a softmax LLaMA, read only."""
    return save_pretrained(random_model(config()), tmp_path_factory.mktemp("plain") / "folder")


@pytest.fixture
def copied(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "copied"))


@pytest.mark.parametrize("name", EVERY_NAME)
def test_out_and_in_again(name: str, tmp_path: Path) -> None:
    """Every attention, with all that it learns or keeps; the parameters in bfloat16, directions in float32."""
    model = random_model(config(name, dtype="bfloat16"))
    folder = save_pretrained(model, tmp_path / "out")
    again = from_pretrained(folder)
    assert_equal(again, model)
    attention = model.config.attention if name != "softmax" else AttentionConfig("softmax")
    assert again.config == replace(model.config, head_dim=4, rotary=again.config.rotary, attention=attention)
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= files
    linear = name != "softmax"
    assert ("modeling_lin_jax_llama.py" in files) == linear
    said = json.loads((folder / "config.json").read_text())
    assert said["model_type"] == ("lin_jax_llama" if linear else "llama")
    assert ("attention" in said) == ("auto_map" in said) == linear


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_types_and_shards(dtype: str, tmp_path: Path, x64: None) -> None:
    """Spread over several files, none larger than allowed unless it holds a single tensor."""
    model = random_model(config("augmented", dtype=dtype, tie_embeddings=True, query_key_norm=True))
    most = 6000
    folder = save_pretrained(model, tmp_path / "out", max_shard_bytes=most)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {name: load_file(folder / name) for name in set(index["weight_map"].values())}
    assert {name for shard in shards.values() for name in shard} == set(index["weight_map"]) == set(entries(model))
    assert all(len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= most for shard in shards.values())
    assert index["metadata"]["total_size"] == sum(t.nbytes for shard in shards.values() for t in shard.values())
    assert_equal(from_pretrained(folder), model)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"tie_embeddings": True}, "llama"),
        ({"attention_bias": True, "output_bias": True, "head_dim": 6}, "llama"),
        ({"attention_bias": True}, "qwen2"),
        ({"query_key_norm": True, "head_dim": 6}, "qwen3"),
    ],
)
def test_transformers_opens_softmax_models(options: dict[str, Any], kind: str, tmp_path: Path) -> None:
    model = random_model(config(**options))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(save_pretrained(model, tmp_path / "out"))
    assert theirs.config.model_type == kind
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 11))
    expected = theirs(torch.tensor(tokens)).logits.detach().numpy()
    found = jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(tokens))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_linearizing(plain: Path) -> None:
    """Parameters that the attention adds begin as in the paper; all others are the checkpoint's."""
    base = variables(from_pretrained(plain))
    attention = AttentionConfig("performer+local+convolution", **GROUPS, initial_alpha=0.25)
    model = from_pretrained(plain, attention=attention)
    found = variables(model)
    mixer = {path[-1]: value for path, value in found.items() if "mixer" in path}
    assert np.all(mixer["alpha"] == 0.25)
    assert not mixer["taps"].any()
    assert np.linalg.matrix_rank(mixer["projection"].reshape(-1, 4)) == 4
    assert not np.array_equal(*mixer["projection"])
    assert all(np.array_equal(found[path], value) for path, value in base.items())
    other = variables(from_pretrained(plain, attention=attention, seed=1))
    assert not np.array_equal(other[_path(other, "projection")], mixer["projection"])


def _path(found: dict[Any, Any], end: str) -> tuple[Any, ...]:
    return next(path for path in found if path[-1] == end)


def test_layer_numbers_are_derived(plain: Path) -> None:
    model = from_pretrained(plain, attention=AttentionConfig("transnormer", **GROUPS))
    assert variables(model)[_path(variables(model), "layer")].tolist() == [0, 1]


def test_another_attention_for_a_linearized_folder(tmp_path: Path) -> None:
    """The old mixer's tensors are left aside, shared ones are kept, what does not fit is named."""
    model = random_model(config("augmented"))
    folder = save_pretrained(model, tmp_path / "out")
    softmax = from_pretrained(folder, attention=AttentionConfig("softmax"))
    assert not [path for path in variables(softmax) if "mixer" in path]
    other = from_pretrained(folder, attention=AttentionConfig("performer+convolution", **GROUPS))
    taps = next(value for path, value in variables(other).items() if path[-1] == "taps")
    assert np.array_equal(taps, variables(model)[_path(variables(model), "taps")])
    with pytest.raises(UserError, match=r"0\.self_attn\.dwconv\.weight has shape \(4, 1, 5, 1\), the model expects"):
        from_pretrained(folder, attention=AttentionConfig("augmented", group_size=4, kernel_size=7))


def test_published_layout(copied: Path) -> None:
    """A plain LLaMA's configuration with `global_factor` and `dwconv.weight` among the tensors, as the paper's are."""
    linearized = random_model(config("augmented"))
    tensors = load_file(save_pretrained(linearized, copied.parent / "linear") / "model.safetensors")
    save_file(tensors, copied / "model.safetensors")
    assert_equal(from_pretrained(copied, attention=linearized.config.attention), linearized)
    with pytest.raises(UserError, match=r"global_factor is unknown.*; give the attention of the model$"):
        from_pretrained(copied)
    del tensors["model.layers.1.self_attn.global_factor"]
    save_file(tensors, copied / "model.safetensors")
    with pytest.raises(UserError, match=r"model: model\.layers\.1\.self_attn\.global_factor is missing$"):
        from_pretrained(copied, attention=linearized.config.attention)


def test_everything_wrong_is_said_before_anything_is_read(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = load_file(copied / "model.safetensors")
    tensors["model.layers.7.mlp.up_proj.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    tensors["model.norm.weight"] = np.ones(15, np.float32)
    save_file(tensors, copied / "model.safetensors")
    monkeypatch.setattr(LazyTensor, "__array__", lambda self, dtype=None, copy=None: pytest.fail("a tensor was read"))
    with pytest.raises(UserError) as caught:
        from_pretrained(copied)
    assert str(caught.value).endswith(
        "does not fit its model: model.layers.1.mlp.up_proj.weight is missing; "
        "model.layers.7.mlp.up_proj.weight is unknown; model.norm.weight has shape (15,), the model expects (16,)"
    )


def test_tied_heads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A tied head may be there once more or not; one that differs is read as it is, in a model that unties it."""
    model = random_model(config(tie_embeddings=True))
    folder = save_pretrained(model, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    for change in (0, 1):
        head = tensors["model.embed_tokens.weight"] + np.float32(change)
        save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
        if change:
            found = from_pretrained(folder)
            assert np.array_equal(found.head.kernel[...], head.T)
            assert not found.config.tie_embeddings
            [line] = caplog.messages
            assert "lm_head.weight is another matrix: it is read, as if tie_word_embeddings were false" in line
        else:
            assert_equal(from_pretrained(folder), model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bloom"}, 'model_type "bloom" in config.json is not supported'),
        ({"model_type": None}, "has no model_type"),
        ({"quantization_config": {"bits": 4}}, "is quantized"),
        ({"attention": {"name": "augmented", "sheep": 1}}, "attention.sheep in config.json is unknown"),
        (
            {"attention": {"name": "augmented", "group_size": "x"}},
            "attention in config.json has a value of a wrong type",
        ),
        ({"attention": "augmented"}, "is not an object; give one"),
        ({"attention": {"name": "magic"}}, "attention.name 'magic' is unknown"),
        ({"attention": {"encoder": {"name": "softmax"}}}, "attention 'encoder' is unknown for a llama"),
        ({"hidden_size": 17}, "is not a multiple"),
    ],
)
def test_refused_configurations(change: dict[str, Any], message: str, copied: Path) -> None:
    said = json.loads((copied / "config.json").read_text())
    said.pop("head_dim")
    (copied / "config.json").write_text(json.dumps(said | change))
    with pytest.raises(UserError) as caught:
        from_pretrained(copied)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_types(plain: Path, tmp_path: Path) -> None:
    """Half precision of a kind that no model has is widened; parameters and activations may differ."""
    halves = {name: value.astype(np.float16) for name, value in load_file(plain / "model.safetensors").items()}
    folder = Path(shutil.copytree(plain, tmp_path / "half"))
    save_file(halves, folder / "model.safetensors")
    model = from_pretrained(folder)
    assert (model.config.dtype, model.config.param_dtype) == ("float32", "float32")
    assert np.array_equal(model.norm.scale[...], halves["model.norm.weight"])
    mixed = from_pretrained(plain, dtype="bfloat16")
    assert (mixed.config.dtype, mixed.config.param_dtype) == ("bfloat16", "float32")
    narrow = from_pretrained(plain, param_dtype="bfloat16")
    assert narrow.config.dtype == "bfloat16"
    assert {value.dtype.name for value in variables(narrow).values()} == {"bfloat16"}
    with pytest.raises(UserError, match="needs 64-bit JAX"):
        from_pretrained(plain, param_dtype="float64")


def test_heads_of_a_family(plain: Path) -> None:
    with pytest.raises(UserError, match="head 'classifier' is unknown for a llama; choose one of causal_lm"):
        from_pretrained(plain, head="classifier")


def test_one_parameter_at_a_time(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each variable goes to its devices, placed as asked, before the next one is read."""
    events: list[Any] = []
    read = LazyTensor.__array__
    monkeypatch.setattr(LazyTensor, "__array__", lambda self, *rest, **more: events.append(self.name) or read(self))
    mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])

    def place(path: tuple[Any, ...], shape: tuple[int, ...]) -> NamedSharding:
        events.append((path, shape))
        return NamedSharding(mesh, PartitionSpec(*(None,) * (len(shape) - 1), "x"))

    attention = AttentionConfig("augmented", **GROUPS)
    model = from_pretrained(plain, attention=attention, shardings=place)
    assert all(leaf[...].sharding.mesh == mesh for _, leaf in nnx.to_flat_state(nnx.state(model)))
    placed = [event for event in events if isinstance(event, tuple)]
    assert {path[-1] for path, _ in placed[:2]} == {"alpha", "taps"}
    names = entries(model)
    paths = [names[event].path if isinstance(event, str) else event[0] for event in events[2:]]
    assert paths == sorted(paths, key=[path for path, _ in placed].index)
    assert_equal(model, from_pretrained(plain, attention=attention))


def test_tokenizer_and_labels(tmp_path: Path) -> None:
    """A tokenizer's ids go into the configuration; a folder's tokenizer files and end tokens are taken over."""
    tokenizer = Tokenizer.train(["some text and some more"] * 20, 280)
    first = save_pretrained(random_model(config()), tmp_path / "first", tokenizer=tokenizer)
    assert json.loads((first / "config.json").read_text())["eos_token_id"] == tokenizer.eos_id
    (first / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    source = json.loads((first / "config.json").read_text())
    second = save_pretrained(from_pretrained(first), tmp_path / "second", tokenizer=first, source=source)
    assert load_tokenizer(second).fingerprint == tokenizer.fingerprint
    assert json.loads((second / "generation_config.json").read_text()) == {"eos_token_id": [3, 4, tokenizer.eos_id]}
    with pytest.raises(UserError, match="holds no tokenizer"):
        save_pretrained(from_pretrained(first), tmp_path / "third", tokenizer=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_model_card(tmp_path: Path) -> None:
    model = random_model(config("augmented"))
    heads = MedusaHeads.on(model, 2)
    figures = {"perplexity": 12.3456, "machine": "a small one"}
    folder = save_pretrained(model, tmp_path / "out", heads=heads, base="owner/base", figures=figures)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\ntags:\n")
    for part in ("made from owner/base", "`augmented` (group_size 4, kernel_size 5", "2 Medusa heads", "| 12.35 |"):
        assert part in card
    assert "trust_remote_code=True" in card
    assert "With PyTorch and transformers 4.57 or newer (tried up to 5.24):" in card
    plain_card = (save_pretrained(random_model(config()), tmp_path / "plain") / "README.md").read_text()
    assert "trust_remote_code" not in plain_card


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("exponential+window", {"features": 6}, "group_size 4, features 6, window_groups 1)"),
        ("hedgehog+window+convolution", {"window": 9, "decay": "token"}, "kernel_size 5, window 9, decay token)"),
    ],
)
def test_model_card_of_a_window(name: str, options: dict[str, Any], expected: str) -> None:
    """Its sizes are named, and those alone that it has."""
    plain = config(name)
    attention = replace(plain.attention, **options)
    model = abstract_model(replace(plain, attention=attention))
    assert f"Its attention: `{name}` ({expected}." in model_card(model, name="out")


class TestWriting:
    """A folder is whole or not there."""

    @pytest.fixture
    def model(self) -> Llama:
        return random_model(config())

    @pytest.fixture
    def full_disk(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        def fail(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("lin_jax.hub.save.write_file", fail)
        return

    def test_nothing_half_written(self, model: Llama, full_disk: None, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="No space left on device"):
            save_pretrained(model, tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_what_was_there_stays(self, model: Llama, full_disk: None, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("precious")
        for overwrite, message in ((False, "is not empty"), (True, "No space left on device")):
            with pytest.raises(UserError, match=message):
                save_pretrained(model, tmp_path / "out", overwrite=overwrite)
        assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]

    def test_overwriting(self, model: Llama, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old").write_text("")
        save_pretrained(model, tmp_path / "out", overwrite=True)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert not (tmp_path / "out" / "old").exists()
        assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o044

    def test_files_are_no_folders(self, model: Llama, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("")
        with pytest.raises(UserError, match="is a file"):
            save_pretrained(model, tmp_path / "out")

    def test_models_of_no_family(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="MedusaHeads belongs to no family"):
            save_pretrained(MedusaHeads(1, 2, 3), tmp_path / "out")


class TestHeads:
    """Medusa heads in the published layout."""

    def test_beside_the_model(self, tmp_path: Path) -> None:
        model = random_model(config("augmented"))
        heads = MedusaHeads.on(model, 3)
        folder = save_pretrained(model, tmp_path / "out", heads=heads)
        said = json.loads((folder / "config.json").read_text())
        assert (said["medusa_num_heads"], said["medusa_num_layers"]) == (3, 1)
        tensors = load_file(folder / "medusa_lm_head.safetensors")
        assert {name: t.shape for name, t in tensors.items() if name.startswith("2.")} == {
            "2.0.linear.weight": (16, 16),
            "2.0.linear.bias": (16,),
            "2.1.weight": (300, 16),
        }
        assert_equal(load_medusa_heads(folder, model), heads)
        assert_equal(from_pretrained(folder), model)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"medusa_num_layers": 2}, "medusa_num_layers 2; give heads with 1"),
            ({"medusa_num_heads": 2}, r"1\.0\.linear\.weight is missing"),
            ({"medusa_num_heads": None}, "holds no Medusa heads"),
        ],
    )
    def test_refused(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        model = random_model(config())
        (tmp_path / "config.json").write_text("{}")
        save_heads(MedusaHeads.on(model, 1), tmp_path)
        said = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(said | change))
        with pytest.raises(UserError, match=message):
            load_medusa_heads(tmp_path, model)
