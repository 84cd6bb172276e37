import runpy
import sys

import pytest
from support.processes import ROOT

from lin_jax.errors import UserError
from lin_jax.training import load_run_config, parse_run_config

TINY = str(ROOT / "configs" / "tiny.yaml")


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs train.py in this process: exit status, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], "missing.yaml"),
        ([TINY, "--model.hiden_size", "4"], "--model.hiden_size"),
        ([TINY, "--model.hidden_size", "large"], "Expected a int. Got value: large"),
        ([TINY, "--model.attention.name", "wonderful"], "attention.name 'wonderful' is unknown; choose one of"),
        ([TINY, "--model.attention.group_size", "0"], "attention.group_size is 0"),
        ([TINY, "--model.num_heads", "5"], "model.hidden_size 32 is not a multiple of model.num_heads 5"),
        ([TINY, "--data.source", "nowhere.txt"], "'nowhere.txt' does not exist"),
        ([TINY, "--training.gradient_accumulation", "3"], "training.batch_size 4 is not a multiple"),
        ([TINY, "--training.steps", "0"], "training.steps is 0; give 1 or more"),
        ([TINY, "--optimizer.learning_rate", "-1"], "optimizer.learning_rate is -1.0"),
        ([TINY, "--objective", "medusa"], "objective 'medusa' needs init_from"),
        ([TINY, "--objective", "medusa", "--init_from", "nowhere"], "nowhere"),
        ([TINY, "--model.vocab_size", "12"], "model.vocab_size 12 is smaller than the tokenizer's 300"),
        ([TINY, "--resume"], "leave --resume out"),
        ([], "no configuration is given; give a YAML file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(script, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = script(*arguments)
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "runs").exists()


def test_an_unknown_name_in_the_file(script, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("output: x\nmodel:\n  hiden_size: 4\n")
    status, _, err = script(str(path))
    assert (status, err.count("\n")) == (2, 1)
    assert "hiden_size" in err


def test_help_names_every_section(script):
    status, out, err = script("--help")
    assert status == 0
    for name in (
        "--output",
        "--resume",
        "--model.attention.group_size",
        "--data.source",
        "--training.gradient_accumulation",
    ):
        assert name in out
    assert "usage: python -m lin_jax train CONFIG.yaml" in out
    assert err == ""


def test_options_override_the_file():
    config, resume, _ = parse_run_config(
        [TINY, "--resume", "--model.attention.group_size", "16", "--optimizer.eps", "1e-6"]
    )
    assert resume
    assert config.model.attention.group_size == 16
    assert config.model.attention.kernel_size == 7
    assert config.optimizer.eps == 1e-6


def test_a_configuration_is_read_as_it_was_saved(tmp_path):
    config, *_ = parse_run_config(
        [
            TINY,
            "--model.rotary.short_factor",
            "[1.0, 2.0]",
            "--optimizer.max_grad_norm",
            "null",
            "--output",
            str(tmp_path),
        ]
    )
    config.save(tmp_path / "config.yaml")
    assert load_run_config(tmp_path) == config
    assert config.model.rotary.short_factor == (1.0, 2.0)
    assert config.optimizer.max_grad_norm is None
    with pytest.raises(UserError, match="is not a run folder"):
        load_run_config(tmp_path.parent)
