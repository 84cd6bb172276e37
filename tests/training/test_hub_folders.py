"""Runs and Hugging Face folders: out with tokenizer and heads, decoded from there, and trained on from there."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.attention import AttentionConfig
from lin_jax.cli.decode.command import decode
from lin_jax.cli.decode.options import parse
from lin_jax.cli.hub.options import main
from lin_jax.errors import UserError
from lin_jax.hub import from_pretrained
from lin_jax.hub.medusa import load_medusa_heads
from lin_jax.models import LlamaConfig, MedusaHeads
from lin_jax.session import Session
from lin_jax.training import load_heads, load_model
from lin_jax.training.run import train
from lin_jax.training.setup import resolve

WORDS = ("the cat", "--max-new-tokens", "20", "--json")


@pytest.fixture(scope="module")
def heads_run(base_run, tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads") / "run"
    train(tiny_run(folder, objective="medusa", init_from=str(base_run), steps=2))
    return folder


@pytest.fixture(scope="module")
def exported(heads_run, tmp_path_factory):
    """A folder that was made of heads, and so of the model under them, too."""
    folder = tmp_path_factory.mktemp("hub") / "out"
    assert main(["export", str(heads_run), str(folder)]) == 0
    return folder


def assert_equal(one: nnx.Module, other: nnx.Module) -> None:
    first, second = (dict(nnx.to_flat_state(nnx.state(each))) for each in (one, other))
    assert set(first) == set(second)
    for path, value in first.items():
        assert np.array_equal(value[...], second[path][...]), path


def text_of(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    assert decode(parse([str(folder), *WORDS, *options])) == 0
    return json.loads(capsys.readouterr().out)["text"]


@pytest.mark.thorough
def test_export(exported, base_run, heads_run, capsys):
    """The model, its heads and its tokenizer; it writes the same text."""
    model = load_model(base_run)[0]
    assert_equal(from_pretrained(exported), model)
    assert_equal(load_medusa_heads(exported, model), load_heads(heads_run))
    drafted = text_of(exported, capsys, "--drafter", "medusa", "--tree", "0;1;0,0")
    assert drafted == text_of(base_run, capsys, "--drafter", "none", "--tree", "none")


def test_export_in_another_type(base_run, tmp_path):
    assert main(["export", str(base_run), str(tmp_path / "out"), "--dtype", "bfloat16", "--step", "8"]) == 0
    model = from_pretrained(tmp_path / "out")
    older = load_model(base_run, 8)[0]
    assert model.config.param_dtype == "bfloat16"
    assert np.array_equal(model.norm.scale[...], older.norm.scale[...].astype(jnp.bfloat16))


@pytest.mark.thorough
def test_heads_from_another_place(exported, base_run, heads_run):
    """Heads of a run stand on an exported model, and exported heads on a run."""
    for model, heads in ((exported, heads_run), (base_run, exported)):
        session = Session.load(model, heads)
        assert_equal(session.parts.medusa, load_heads(heads_run))
        # What training recorded of them lies beside the heads of a run, and not in a published folder.
        assert set(session.accuracy) == ({"medusa"} if heads == heads_run else set())


def test_a_folder_without_steps(exported):
    with pytest.raises(UserError, match="is a Hugging Face checkpoint, which has no steps; leave the step out"):
        Session.load(exported, step="best")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot read a tokenizer"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"torn"), "is truncated"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "vit"}'),
            '"vit" in config.json is not supp',
        ),
    ],
)
def test_damaged_folders(exported, tmp_path, change, message):
    import shutil

    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    change(folder)
    with pytest.raises(UserError, match=message):
        Session.load(folder)


def test_training_on(exported, tiny_run, tmp_path):
    """Another attention on an exported model: its sizes are the folder's, and a resumed run knows them still."""
    model = LlamaConfig(attention=AttentionConfig("flash_local", group_size=8))
    run = tiny_run(tmp_path / "run", model=model, init_from=str(exported), steps=2)
    assert train(run).status == 0
    _, config, _ = load_model(tmp_path / "run")
    assert (config.model.hidden_size, config.model.attention) == (16, model.attention)
    assert resolve(run, resume=True).config == config


@pytest.mark.thorough
def test_heads_on_an_exported_model(exported, tiny_run, tmp_path):
    folder = tmp_path / "heads"
    train(tiny_run(folder, objective="medusa", init_from=str(exported), steps=1))
    assert isinstance(Session.load(exported, folder).parts.medusa, MedusaHeads)
    assert main(["export", str(folder), str(tmp_path / "out")]) == 0
    assert_equal(from_pretrained(tmp_path / "out"), from_pretrained(exported))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no folder nowhere"),
        (["."], "is not a run folder"),
        (["RUN", "--step", "5"], "has no checkpoint of step 5"),
        (["HUB", "--step", "5"], "has no steps"),
        (["RUN", "--figures", "missing.json"], "cannot be read as JSON"),
    ],
)
def test_refused_exports(arguments, message, base_run, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"RUN": str(base_run), "HUB": str(exported)}
    source, *options = [places.get(word, word) for word in arguments]
    with pytest.raises(UserError, match=message):
        main(["export", source, "out", *options])
    assert not list(tmp_path.iterdir())
