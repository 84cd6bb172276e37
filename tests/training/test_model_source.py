"""Places that hold models: the tokens that end their texts."""

import json
from pathlib import Path
from typing import Any

import pytest

from lin_jax.data import Tokenizer
from lin_jax.training.model_source import ModelSource

TOKENIZER = Tokenizer.train(["a text"], 260)


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({}, None, (0,)),
        ({"eos_token_id": [0, 7]}, None, (0, 7)),
        ({"eos_token_id": 7}, {"eos_token_id": [7]}, (7, 0)),
        ({"eos_token_id": 7}, {"eos_token_id": 5}, (5, 7, 0)),
        ({"eos_token_id": None}, {"eos_token_id": None}, (0,)),
        ({"eos_token_id": []}, {}, (0,)),
        ({}, {"eos_token_id": [5, 5]}, (5, 0)),
    ],
)
def test_texts_end_at_whatever_any_file_names(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None, ends: tuple[int, ...]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert ModelSource(tmp_path).end_tokens(TOKENIZER) == ends
    without = ModelSource(tmp_path).end_tokens(Tokenizer(TOKENIZER.backend))
    assert without == (ends if config.get("eos_token_id") == [0, 7] else ends[:-1])
