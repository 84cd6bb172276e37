"""Runs of every family: language models that stop, go on, decode, export and carry heads, as LLaMA's do."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from support.cells import cells
from support.interrupted import lines_of, stopping_after
from support.processes import ROOT

from lin_jax.attention import AttentionConfig
from lin_jax.cli.decode.command import decode
from lin_jax.cli.decode.options import parse
from lin_jax.cli.hub.options import main
from lin_jax.errors import UserError
from lin_jax.hub import from_pretrained
from lin_jax.models import BertConfig, Flash, FlashConfig, Gpt2, Gpt2Config, LlamaConfig, T5Config
from lin_jax.models.registry import CAUSAL_LM, MODELS, model_class
from lin_jax.training import RunConfig, load_heads, load_model, load_run_config, parse_run_config
from lin_jax.training.checkpoint.manager import read_metadata, saved_steps
from lin_jax.training.config import plain
from lin_jax.training.objectives.registry import check_run
from lin_jax.training.run import train
from lin_jax.training.setup import resolve

TINY = str(ROOT / "configs" / "tiny.yaml")
ATTENTION = AttentionConfig(group_size=8, kernel_size=7, initial_alpha=0.1)
MODELS_OF = {
    "gpt2": (Gpt2, Gpt2Config(hidden_size=16, num_layers=2, num_heads=2, max_positions=64, attention=ATTENTION)),
    "flash": (Flash, FlashConfig(hidden_size=16, num_layers=2, query_key_size=8, attention=ATTENTION)),
}


@pytest.fixture(scope="module", params=cells(["flash"], ["gpt2"]))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def run(family, tiny_run, tmp_path_factory):
    """A finished run's configuration."""
    base = tiny_run(tmp_path_factory.mktemp("families") / family, steps=6)
    config = replace(base, family=family, model=MODELS_OF[family][1])
    assert train(config).status == 0
    return config


@pytest.mark.thorough
def test_a_stopped_run_continues_exactly(run, tmp_path, monkeypatch):
    broken = replace(run, output=str(tmp_path / "broken"))
    with stopping_after(3, monkeypatch):
        assert train(broken).status == 143
    assert saved_steps(Path(broken.output)) == [3]
    assert train(broken, resume=True).status == 0
    assert lines_of(Path(broken.output)) == lines_of(Path(run.output))


@pytest.mark.thorough
def test_the_run_is_its_familys(run, family):
    kind, given = MODELS_OF[family]
    model, config, step = load_model(run.output)
    assert type(model) is kind
    assert step == 6
    assert (config.family, config.model) == (family, replace(given, vocab_size=280))
    metadata = read_metadata(Path(run.output), 6)
    assert metadata.model == plain(config.model)
    assert load_run_config(run.output) == config


@pytest.mark.thorough
def test_it_decodes_and_exports(run, tmp_path, capsys):
    words = ("the cat", "--max-new-tokens", "12", "--json", "--tree")
    assert main(["export", run.output, str(tmp_path / "out")]) == 0
    capsys.readouterr()
    texts = []
    for place, drafter, tree in ((run.output, "none", "none"), (tmp_path / "out", "ngram", "0;0,0")):
        assert decode(parse([str(place), *words, tree, "--drafter", drafter])) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1]
    # The exported folder is what another run begins with.
    model = load_model(run.output)[0]
    begun = resolve(replace(run, output=str(tmp_path / "on"), init_from=str(tmp_path / "out")), resume=False)
    begun_with = begun.objective.parts(begun.state.params, {})[0]
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(each))) for each in (begun_with, model))
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(value[...], theirs[path][...])
    assert type(from_pretrained(tmp_path / "out")) is type(model)


@pytest.mark.thorough
def test_heads_stand_on_it(run, family, tmp_path):
    """The run of heads is configured for a LLaMA, as the recipes are, and takes what the model is from it."""
    objective = {"gpt2": "medusa", "flash": "path"}[family]
    heads = replace(
        run, objective=objective, init_from=run.output, output=str(tmp_path), family="llama", model=LlamaConfig()
    )
    train(replace(heads, training=replace(run.training, steps=1)))
    load_heads(tmp_path, model=load_model(run.output)[0])
    assert load_run_config(tmp_path).family == family


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("gpt2", {"model": LlamaConfig()}, "family 'gpt2' needs a model of type Gpt2Config, and this one is a LlamaC"),
        ("opt", {}, "family 'opt' is unknown; choose one of llama, gpt2, t5, bert, flash"),
        ("t5", {"model": T5Config()}, "family 't5' has no model for causal_lm; choose one of llama, gpt2, flash"),
        (
            "bert",
            {"model": BertConfig(), "objective": "medusa_joint", "init_from": "x"},
            "family 'bert' has no model for causal_lm",
        ),
    ],
)
def test_what_does_not_fit(family, options, message):
    with pytest.raises(UserError) as refused:
        check_run(RunConfig(output="x", family=family, **options))
    assert message in str(refused.value)


def test_what_is_found_out_before_text_is_read(run, family, base_run, tmp_path):
    config = replace(run, output=str(tmp_path))
    with pytest.raises(UserError, match=f"holds a llama, and the family of this run is {family}; give family llama"):
        resolve(replace(config, init_from=str(base_run)), resume=False)
    if family == "gpt2":
        longer = replace(config, data=replace(config.data, sequence_length=65))
        with pytest.raises(UserError, match="sequence_length 65 is more than the 64 of"):
            resolve(longer, resume=False)


def test_options_are_those_of_the_family(tmp_path):
    flash = ["--family", "flash", "--output", "x"]
    assert parse_run_config([*flash, "--model.query_key_size=64"])[0].model == FlashConfig(query_key_size=64)
    file = tmp_path / "gpt2.yaml"
    file.write_text("output: x\nfamily: gpt2\nmodel:\n  max_positions: 99\n")
    config, *_ = parse_run_config([str(file), "--model.num_layers", "3"])
    assert config.model == Gpt2Config(max_positions=99, num_layers=3)
    # The command line has the last word, and then the file's options are not the family's.
    with pytest.raises(UserError, match="max_positions"):
        parse_run_config([str(file), "--family=llama"])
    for wrong in (["--family", "opt"], ["--model.rotary.base", "2.0"]):
        with pytest.raises(UserError, match=r"family 'opt' is unknown|rotary"):
            parse_run_config([*flash, *wrong])


def test_help_is_the_familys(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_run_config(["--config", TINY, "--family", "t5", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "--model.decoder_start_token" in said
    assert "--model.rotary" not in said


def test_the_registry_knows_every_family():
    for name, family in MODELS.items():
        config = family.config()
        if CAUSAL_LM in family.models:
            assert model_class(config, CAUSAL_LM) is family.models[CAUSAL_LM]
        assert parse_run_config(["--output", "x", "--family", name, *_objective(name)])[0].model == config


def _objective(family):
    tasked = ["--objective", "classification", "--data.task", "rte", "--data.source", "x"]
    return [] if CAUSAL_LM in MODELS[family].models else tasked
