"""Runs with adapters: what learns and what never changes, merged models, exact resuming, and what is refused."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from support.interrupted import lines_of, stopping_after

from lin_jax.cli.hub.options import main
from lin_jax.errors import UserError
from lin_jax.hub import from_pretrained
from lin_jax.hub.peft import load_adapters
from lin_jax.models.adapters import AdapterConfig
from lin_jax.models.lora import merge_lora
from lin_jax.models.params import params_fingerprint, params_of
from lin_jax.training import load_model, read_base
from lin_jax.training.checkpoint.files import read_params, saved_steps
from lin_jax.training.objectives.registry import check_run, objective_of
from lin_jax.training.run import train
from lin_jax.training.setup import resolve

ADAPTERS = AdapterConfig(rank=2, alpha=6.0, modules_to_save=("norms", "mixer"))


@pytest.fixture(scope="module")
def adapted_run(tiny_run, base_run):
    """Makes the configuration of a run with adapters on the base run."""

    def make(output, adapters=ADAPTERS, **options):
        return replace(tiny_run(output, init_from=str(base_run), steps=7, **options), adapters=adapters)

    return make


@pytest.fixture(scope="module")
def finished(adapted_run, tmp_path_factory):
    """A finished run with adapters: its folder."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    assert train(adapted_run(folder)).status == 0
    return folder


def learnt(folder, config, step):
    return flatten_dict(read_params(folder, step, objective_of(config).shapes()))


def test_a_loaded_model_is_the_base_and_the_product(finished, base_run):
    model, config, step = load_model(finished)
    base = flatten_dict(params_of(load_model(base_run)[0]))
    params = learnt(finished, config, step)
    for path, value in flatten_dict(params_of(model)).items():
        update = (*path[:-1], "update", "lora_a")
        if update in params:
            first, second = (np.asarray(params[(*update[:-1], f"lora_{letter}")], np.float64) for letter in "ab")
            expected = base[path] + 6 / 2 * np.einsum("lir,lro->lio", first, second)
            np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-7)
            assert np.any(value != base[path])
        else:
            assert np.array_equal(value, params.get(path, base[path])), path
            assert (path in params) == np.any(value != base[path])
    assert {path[-3] for path in params if path[-1] == "lora_a"} == {"query", "key", "value", "out"}


def test_what_is_frozen_stays_and_is_not_saved(finished, base_run, adapted_run):
    run = resolve(adapted_run(finished), resume=True)
    names = {path[-1] for path in flatten_dict(run.state.params)}
    assert names == {"lora_a", "lora_b", "scale", "alpha", "taps"}
    moments = [leaf for leaf in jax.tree.leaves(run.state.optimizer) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(run.state.params))
    assert read_base(finished).folder == base_run
    assert read_base(finished).fingerprint == params_fingerprint(run.frozen)


@pytest.mark.thorough
def test_a_stopped_run_continues_exactly(adapted_run, tmp_path, monkeypatch):
    """Of a model with draft heads, which learn in full beside its adapters."""
    whole, broken = (adapted_run(tmp_path / name, objective="medusa_joint") for name in ("whole", "broken"))
    assert train(whole).status == 0
    with stopping_after(3, monkeypatch):
        assert train(broken).status == 143
    assert saved_steps(tmp_path / "broken")[-1] == 3
    assert train(broken, resume=True).status == 0
    assert lines_of(tmp_path / "broken") == lines_of(tmp_path / "whole")
    ours, theirs = (params_of(load_model(tmp_path / name)[0]) for name in ("broken", "whole"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_another_base_is_noticed(finished, base_run, tmp_path):
    """The base's run has lost the checkpoint that the adapters stand on, and has another in its place."""
    for folder in (finished, base_run):
        shutil.copytree(folder, tmp_path / folder.parent.name / folder.name)
    copy, base = (tmp_path / folder.parent.name / folder.name for folder in (finished, base_run))
    ours, theirs = (params_of(load_model(folder)[0]) for folder in (copy, finished))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    shutil.rmtree(base / "checkpoints" / "12")
    shutil.copytree(base / "checkpoints" / "8", base / "checkpoints" / "12")
    with pytest.raises(UserError, match=r"stands on step 12 of .*base, and that is another model by now"):
        load_model(copy)


def test_a_base_that_was_moved(finished, base_run, tmp_path):
    """It is looked for where it was, seen from the run, then where `init_from` has it."""
    copy = shutil.copytree(finished, tmp_path / "far" / "copy")
    ours, theirs = (params_of(load_model(folder)[0]) for folder in (copy, finished))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(str(base_run), str(tmp_path / "gone")))
    with pytest.raises(
        UserError, match=r"stands on the model in .*base, which is not there; put it back, or a link"
    ) as caught:
        load_model(copy)
    assert "\n" not in str(caught.value)


def test_export_merged_and_alone(finished, base_run, tmp_path, capsys):
    """The merged folder is the model; the adapters' folder makes the same layers of the base model."""
    assert main(["export", str(finished), str(tmp_path / "whole")]) == 0
    model = load_model(finished)[0]
    exported = params_of(from_pretrained(tmp_path / "whole"))
    jax.tree.map(np.testing.assert_array_equal, exported, params_of(model))
    assert main(["export", str(finished), str(tmp_path / "alone"), "--adapters"]) == 0
    assert "mixer, norms were trained in full" in capsys.readouterr().out
    config = json.loads((tmp_path / "alone" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 6.0)
    base = load_model(base_run)[0]
    load_adapters(base, tmp_path / "alone")
    merge_lora(base)
    for name in ("query", "key", "value", "out"):
        ours, theirs = (getattr(each.layers.layers.attention, name).kernel[...] for each in (base, model))
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(UserError, match=r"base holds no adapters"):
        main(["export", str(base_run), str(tmp_path / "none"), "--adapters"])


@pytest.mark.thorough
def test_heads_on_a_merged_model(finished, tiny_run, tmp_path):
    from lin_jax.session import Session

    train(tiny_run(tmp_path / "heads", objective="medusa", init_from=str(finished), steps=1))
    assert Session.load(finished, tmp_path / "heads").parts.medusa is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: replace(run, init_from=None), "adapters need init_from"),
        (lambda run: replace(run, objective="medusa"), "objective 'medusa' trains heads; leave adapters out"),
        (lambda run: replace(run, adapters=AdapterConfig(rank=0)), "adapters.rank is 0; give 1 or more"),
        (lambda run: replace(run, adapters=AdapterConfig(target_modules=())), "adapters.target_modules is empty"),
        (
            lambda run: replace(run, adapters=AdapterConfig(modules_to_save=("tail",))),
            "adapters.modules_to_save names 'tail'; choose among",
        ),
        (
            lambda run: resolve(replace(run, adapters=AdapterConfig(target_modules=("querry",))), resume=False).config,
            "adapters.target_modules names 'querry', which the model has no layer of; choose among down, gate",
        ),
    ],
)
def test_what_is_wrong_is_said(change, message, adapted_run, tmp_path):
    run = adapted_run(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        check_run(change(run))
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_a_frozen_model_may_be_narrower_than_what_learns(adapted_run, tmp_path, base_run):
    """A bfloat16 base from a folder: adapters and norms learn in float32, and the merged model is bfloat16 again."""
    assert main(["export", str(base_run), str(tmp_path / "hub")]) == 0
    run = adapted_run(tmp_path / "run")
    run = replace(run, init_from=str(tmp_path / "hub"), model=replace(run.model, param_dtype="bfloat16"))
    prepared = resolve(run, resume=False)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(prepared.state.params)} == {"float32"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(prepared.frozen)} == {"bfloat16"}
    objective = prepared.objective
    model, _ = objective.parts(prepared.state.params, prepared.frozen)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params_of(model))} == {"bfloat16"}
