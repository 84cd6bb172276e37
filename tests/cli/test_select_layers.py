"""Layers that keep softmax, from a run and its linearized student to a recipe."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support.processes import ROOT

import lin_jax
from lin_jax.attention import AttentionConfig
from lin_jax.cli.select_layers import main, with_layers
from lin_jax.errors import UserError
from lin_jax.training import load_run_config
from lin_jax.training.run import train

RECIPES = {
    "block": "output: runs/x  # here\nmodel:\n  attention:\n    name: augmented  # as published\n    group_size: 64\n"
    "\n# of the text\ndata: {source: a.txt}\n",
    "name": "output: x\nmodel:\n  attention: augmented # plain\n  num_layers: 8\n",
    "flow": "output: x\nmodel: {attention: {name: augmented, layers: {0: softmax}}, num_layers: 8}\n",
    "no attention": "model:\n  # eight\n  num_layers: 8\noutput: x\n",
    "empty flow": "model: {num_layers: 8}\noutput: x\n",
    "no model": "output: x\nstages:\n- name: transfer\n",
    "a reference": "base: &it {name: augmented}\nmodel:\n  attention: *it\n",
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_changes_only_where_it_must(name: str) -> None:
    layers = {2: AttentionConfig("softmax"), 5: AttentionConfig("softmax", window=9)}
    before, text = RECIPES[name], with_layers(RECIPES[name], layers)
    given, found = yaml.safe_load(before), yaml.safe_load(text)
    assert found["model"]["attention"]["layers"] == {2: "softmax", 5: {"name": "softmax", "window": 9}}
    old = (given.get("model") or {}).get("attention", {})
    old = {"name": old} if isinstance(old, str) else {key: value for key, value in old.items() if key != "layers"}
    del found["model"]["attention"]["layers"]
    assert found["model"].pop("attention") == old
    assert {**found, "model": found["model"]} == {
        **given,
        "model": {key: value for key, value in (given.get("model") or {}).items() if key != "attention"},
    }
    attention = AttentionConfig.of(yaml.safe_load(text)["model"]["attention"])
    assert [each.label for each in attention.of_layers(6)][2::3] == ["softmax", "softmax of 9"]
    if name != "a reference":
        comments = [line[line.index("#") :] for line in before.splitlines() if "#" in line]
        assert all(comment in text for comment in comments if comment != "# as published")


def test_a_list_is_refused() -> None:
    with pytest.raises(UserError, match="is a list; give one attention"):
        with_layers("model: {attention: [augmented, softmax]}", {0: AttentionConfig("softmax")})


@pytest.mark.thorough
def test_a_run_and_its_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file of what is known makes a second call short, and another model's is refused."""
    config = replace(load_run_config(ROOT / "configs" / "tiny.yaml"), output=str(tmp_path / "run"))
    softmax = replace(config.model, attention=AttentionConfig("softmax"))
    train(replace(config, model=softmax, training=replace(config.training, steps=2)))
    model, tokenizer = lin_jax.from_pretrained(tmp_path / "run", attention="augmented")
    lin_jax.save_pretrained(model, tmp_path / "student", tokenizer=tokenizer)
    (tmp_path / "text.txt").write_text("".join(f"{n} and {n * n} are told apart. " for n in range(300)))
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "chosen.yaml"
    recipe.write_text("output: x\nmodel: {attention: augmented}\n")
    places = [str(tmp_path / "student"), "--teacher", str(tmp_path / "run"), "--text", str(tmp_path / "text.txt")]
    files = ["--recipe", str(recipe), "--output", str(output)]
    sizes = ["--sequence-length", "24", "--batch", "2", "--batches", "2"]
    capsys.readouterr()
    assert main([*places, *files, *sizes, "--keep", "1"]) == 0
    said = json.loads(capsys.readouterr().out)
    count = softmax.num_layers
    assert sorted(said["restored"], key=int) == [str(number) for number in range(count)]
    best = min(said["restored"], key=lambda layer: said["restored"][layer])
    assert said["layers"] == [int(best)]
    assert yaml.safe_load(output.read_text())["model"]["attention"] == {
        "name": "augmented",
        "layers": {int(best): "softmax"},
    }
    record = Path(f"{output}.layers.json")
    known = json.loads(record.read_text())
    assert (known["batches"], known["tokens"]) == (2, said["tokens"])
    record.write_text(json.dumps(known | {"sums": [0.5 * each for each in known["sums"]]}))
    assert main([*places, *files, *sizes, "--one-in", str(count)]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["divergence"] == pytest.approx(said["divergence"] / 2)  # It is what the file says.
    with pytest.raises(UserError, match="is of other models or another text; remove it"):
        main([*places, *files, *sizes[:-1], "1", "--keep", "1"])
    with pytest.raises(UserError, match=f"{count + 1} of {count} layers are to keep"):
        main([*places, *files, *sizes, "--keep", str(count + 1)])
