"""Texts of a model's own, to train its draft heads on."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.processes import ROOT

from lin_jax.cli.self_generate import CIRCLE, PERIOD, before_circles, main
from lin_jax.errors import UserError
from lin_jax.training import load_run_config
from lin_jax.training.run import train


def before_circles_slowly(tokens: list[int]) -> list[int]:
    for end in range(CIRCLE, len(tokens)):
        for period in range(1, PERIOD + 1):
            begin = end - CIRCLE + 1
            if begin >= period and tokens[begin : end + 1] == tokens[begin - period : end + 1 - period]:
                return tokens[:begin]
    return tokens


def test_texts_end_where_they_go_round_in_circles() -> None:
    rng = np.random.default_rng(0)
    for case in range(200):
        tokens = rng.integers(0, 2 if case % 2 else 50, rng.integers(0, 60)).tolist()
        circle = rng.integers(0, 50, rng.integers(1, PERIOD + 3)).tolist()
        tokens += (circle * 100)[: rng.integers(0, 2 * CIRCLE + PERIOD)]
        tokens += rng.integers(0, 50, rng.integers(0, 20)).tolist()
        assert before_circles(tokens) == before_circles_slowly(tokens)


def test_texts_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(load_run_config(ROOT / "configs" / "tiny.yaml"), output=str(tmp_path / "run"))
    train(replace(config, training=replace(config.training, steps=2)))
    output = tmp_path / "own.jsonl"
    options = (str(tmp_path / "run"), str(output), "--temperature", "1")
    assert main([*options, "--texts", "5", "--batch", "2", "--new-tokens", "9", "--prompt-tokens", "4"]) == 0
    assert "5 texts" in capsys.readouterr().out
    texts = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    assert len(texts) == 5
    assert all(texts)
    with pytest.raises(UserError, match="--texts is 0"):
        main([*options, "--texts", "0"])
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*gone; make it, or give another file"):
        main(["nowhere", str(tmp_path / "gone" / "own.jsonl")])
