"""YAML and options: short forms, keys of earlier versions, and folders that earlier versions wrote."""

import re

import pytest
import yaml

from lin_jax.attention import AttentionConfig
from lin_jax.errors import UserError
from lin_jax.training import HeadsConfig, load_run_config, parse_run_config
from lin_jax.training.config_file import RENAMED

# A value for every key of an earlier version.
OLD = {
    "adapters.targets": ["query"],
    "adapters.also": ["norms"],
    "head_targets": "model",
    "medusa_heads": 3,
    "medusa_decay": 0.7,
    "path_depth": 6,
    "path_decay": 0.9,
    "path_width": 24,
    "head_coefficient": 0.3,
    "head_learning_rate_factor": 2.0,
    "joint_warmup_steps": 7,
    "optimizer.clip_norm": 2.0,
    "optimizer.final_fraction": 0.2,
    "training.accumulation": 2,
    "training.watch.stall_seconds": 3.0,
    "training.watch.hang_seconds": 60.0,
    "training.watch.on_nan": "skip",
    "model.window": 16,
}


def nested(flat):
    content = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        place = content
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return content


def written(path, content):
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_an_attention_may_be_a_name(tmp_path):
    base = {"output": "x"}
    whole = written(tmp_path / "whole.yaml", base | {"model": {"attention": {"name": "relu+local", "group_size": 64}}})
    short = written(tmp_path / "short.yaml", base | {"model": {"attention": "relu+local"}})
    plain = written(tmp_path / "plain.yaml", base)
    expected = parse_run_config([whole]).config
    assert parse_run_config([short]).config == expected
    assert parse_run_config([plain, "--model.attention", "relu+local"]).config == expected
    assert parse_run_config([plain, "--model.attention=relu+local"]).config == expected


def test_an_attention_may_differ_from_layer_to_layer(tmp_path):
    """A list or numbers, whose entries take what they do not say from beside them; an option replaces a file's."""

    def attention(given, *options):
        return parse_run_config(
            [written(tmp_path / "run.yaml", {"output": "x", "model": given}), *options]
        ).config.model

    model = attention({"attention": ["augmented", {"name": "softmax", "window": 9}]})
    assert [each.label for each in model.attention.of_layers(4)] == ["augmented", "softmax of 9"] * 2
    mapping = {"group_size": 32, "layers": {1: "softmax", 3: {"name": "relu", "group_size": 8}}}
    model = attention({"attention": mapping}, "--model.attention.kernel_size", "5")
    found = [(each.name, each.group_size, each.kernel_size) for each in model.attention.of_layers(4)]
    assert found == [("augmented", 32, 5), ("softmax", 32, 5), ("augmented", 32, 5), ("relu", 8, 5)]
    options = ("--model.attention", "[relu, softmax]")
    assert attention({"attention": mapping}, *options).attention.label == "[relu, softmax]"
    assert attention({"attention": mapping}, "--model.attention=relu").attention.label == "relu"
    with pytest.raises(UserError, match="stands without a value; give a name, or a list"):
        attention({}, "--model.attention")


@pytest.mark.parametrize("key", OLD)
def test_an_old_key_is_refused_with_the_new_one(key, tmp_path):
    new = next(RENAMED[old] + key[len(old) :] for old in RENAMED if key == old or key.startswith(f"{old}."))
    file = written(tmp_path / "run.yaml", {"output": "x", **nested({key: OLD[key]})})
    with pytest.raises(UserError, match=rf"run\.yaml: {re.escape(key)} is now {re.escape(new)}; rename it"):
        parse_run_config([file])
    plain = written(tmp_path / "plain.yaml", {"output": "x"})
    with pytest.raises(UserError, match=rf"--{re.escape(key)} is now --{re.escape(new)}; give that"):
        parse_run_config([plain, f"--{key}", str(OLD[key])])


def test_a_folder_of_an_earlier_version_is_read(tmp_path):
    """Of keys that became one, those of the run's objective count."""
    flat = OLD | {"output": "elsewhere", "objective": "path", "init_from": "base", "training.batch_size": 4}
    flat["model.attention.name"] = "softmax"
    for objective, depth, decay in (("path", 6, 0.9), ("medusa", 3, 0.7)):
        written(tmp_path / "config.yaml", nested(flat | {"objective": objective}))
        config = load_run_config(tmp_path)
        assert config.output == str(tmp_path)
        # Path heads read the last layer alone then.
        layers = () if objective == "path" else None
        assert config.heads == HeadsConfig("model", depth, decay, 24, 0.3, 2.0, 7, layers)
        assert config.model.attention.window == 16
        assert config.adapters.target_modules == ("query",)
        assert config.adapters.modules_to_save == ("norms",)
        assert (config.optimizer.max_grad_norm, config.optimizer.min_lr_ratio) == (2.0, 0.2)
        training = config.training
        assert (training.gradient_accumulation, training.loss_spikes.on_nan) == (2, "skip")
        assert (training.monitoring.stall_seconds, training.monitoring.hang_seconds) == (3.0, 60.0)


def test_a_window_of_an_earlier_version_was_softmax_alone(tmp_path):
    """Beside any other attention it meant nothing, and would be refused now."""
    content = {"output": "elsewhere", "model": {"window": 16, "attention": {"name": "augmented"}}}
    written(tmp_path / "config.yaml", content)
    assert load_run_config(tmp_path).model.attention == AttentionConfig("augmented")
