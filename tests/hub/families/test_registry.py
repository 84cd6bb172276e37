"""Every family and head: out and in again bit for bit, open to transformers, turned into one another."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file
from support.cells import some_of

from lin_jax.attention import AttentionConfig
from lin_jax.cli.hub.options import main
from lin_jax.errors import UserError
from lin_jax.hub import from_pretrained, save_pretrained
from lin_jax.hub.families.registry import FAMILIES
from lin_jax.models import BertConfig, FlashConfig, Gpt2Config, LlamaConfig, T5Config

AUGMENTED = AttentionConfig("augmented", group_size=4, kernel_size=5)
PERFORMER = AttentionConfig("performer+local", group_size=4, features=6)
SOFTMAX = AttentionConfig("softmax")
SIZES = {"vocab_size": 13, "hidden_size": 16, "num_layers": 2}
HEADS = {**SIZES, "num_heads": 4, "intermediate_size": 24}
CONFIGS: dict[str, Callable[[AttentionConfig], Any]] = {
    "llama": lambda attention: LlamaConfig(**HEADS, attention=attention),
    "gpt2": lambda attention: Gpt2Config(**HEADS, max_positions=32, num_labels=3, attention=attention),
    "bert": lambda attention: BertConfig(**HEADS, max_positions=32, num_labels=3, attention=attention),
    "flash": lambda attention: FlashConfig(**SIZES, query_key_size=8, attention=attention),
    "t5": lambda attention: T5Config(
        **HEADS,
        head_dim=4,
        num_decoder_layers=1,
        num_labels=3,
        encoder_attention=attention,
        decoder_attention=attention,
        cross_attention=SOFTMAX,
    ),
}
KINDS = [(family.name, head) for family in FAMILIES.values() for head in family.heads]
AUTOMATIC = {
    "causal_lm": transformers.AutoModelForCausalLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "classifier": transformers.AutoModelForSequenceClassification,
    "masked_lm": transformers.AutoModelForMaskedLM,
    "encoder": transformers.AutoModel,
}


def random_model(family: str, head: str, attention: AttentionConfig) -> nnx.Module:
    """Everything that is stored random, also what begins as a constant."""
    config, rng = CONFIGS[family](attention), np.random.default_rng(0)
    build = FAMILIES[family].heads[head].model
    model = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    state = nnx.state(model)
    for _, leaf in nnx.to_flat_state(state):
        leaf.set_value(jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype))
    nnx.update(model, state)
    return model


def variables(model: nnx.Module) -> dict[Any, np.ndarray]:
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def assert_equal(one: nnx.Module, other: nnx.Module) -> None:
    first, second = variables(one), variables(other)
    assert set(first) == set(second)
    for path, value in first.items():
        assert np.array_equal(value, second[path]), path


@pytest.mark.parametrize("attention", some_of([AUGMENTED, SOFTMAX, PERFORMER], 1), ids=lambda each: each.name)
@pytest.mark.parametrize(("family", "head"), KINDS)
def test_out_and_in_again(
    family: str, head: str, attention: AttentionConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = random_model(family, head, attention)
    folder = save_pretrained(model, tmp_path / "out")
    again = from_pretrained(folder)
    assert type(again) is type(model)
    assert_equal(again, model)
    assert save_pretrained(again, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert main(["inspect", str(folder)]) == 0
    assert type(model).__name__ in capsys.readouterr().out
    said = json.loads((folder / "config.json").read_text())
    assert said["model_type"] == {
        (True, True): family,
        (True, False): f"lin_jax_{family}",
    }.get((FAMILIES[family].known, attention == SOFTMAX), "flash_gau")


@pytest.mark.parametrize(("family", "head"), [(family, head) for family, head in KINDS if FAMILIES[family].known])
def test_transformers_opens_softmax_models(family: str, head: str, tmp_path: Path) -> None:
    """Every tensor is known there, and none is missed."""
    folder = save_pretrained(random_model(family, head, SOFTMAX), tmp_path / "out")
    theirs, report = AUTOMATIC[head].from_pretrained(folder, output_loading_info=True)
    assert type(theirs).__name__ == json.loads((folder / "config.json").read_text())["architectures"][0]
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert head != "classifier" or theirs.config.num_labels == 3


@pytest.mark.parametrize(
    ("family", "stored", "asked"),
    [
        ("bert", "masked_lm", "classifier"),
        ("bert", "encoder", "classifier"),
        ("bert", "encoder", "masked_lm"),
        ("bert", "classifier", "encoder"),
        ("gpt2", "causal_lm", "classifier"),
        ("t5", "seq2seq", "classifier"),
        ("flash", "causal_lm", "encoder"),
    ],
)
def test_another_head(family: str, stored: str, asked: str, tmp_path: Path) -> None:
    """The trunk is the checkpoint's, and only what the head adds is new; attention may change at once."""
    model = random_model(family, stored, SOFTMAX)
    folder = save_pretrained(model, tmp_path / "out")
    other = from_pretrained(folder, head=asked, attention=AUGMENTED if family in ("bert", "gpt2") else None)
    assert type(other) is FAMILIES[family].heads[asked].model
    trunk = {path[-4:]: value for path, value in variables(model).items() if "layers" in path}
    found = {path[-4:]: value for path, value in variables(other).items() if "layers" in path}
    assert all(np.array_equal(found[path], value) for path, value in trunk.items())
    assert all(np.isfinite(value).all() for value in variables(other).values())
    # What the trunk lacks is no new head.
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(name for name, entry in FAMILIES[family].entries(model).items() if "layers" in entry.path))
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="is missing"):
        from_pretrained(folder, head=asked)


def test_attentions_by_name(tmp_path: Path) -> None:
    """A T5 has three, which a folder keeps apart."""
    folder = save_pretrained(random_model("t5", "seq2seq", SOFTMAX), tmp_path / "out")
    given = {"encoder": PERFORMER, "cross": AttentionConfig("flash_global")}
    model = from_pretrained(folder, attention=given)
    config = model.config
    assert (config.encoder_attention, config.decoder_attention) == (PERFORMER, SOFTMAX)
    second = save_pretrained(model, tmp_path / "second")
    said = json.loads((second / "config.json").read_text())["attention"]
    assert {name: each["name"] for name, each in said.items()} == {
        "encoder": "performer+local",
        "decoder": "softmax",
        "cross": "flash_global",
    }
    again = from_pretrained(second)
    assert again.config == replace(config, dtype=again.config.dtype)
    assert_equal(again, model)
    changed = from_pretrained(second, attention={"decoder": AUGMENTED})
    assert (changed.config.encoder_attention, changed.config.decoder_attention) == (PERFORMER, AUGMENTED)
    with pytest.raises(UserError, match="attention 'middle' is unknown for a t5; it has encoder, decoder, cross"):
        from_pretrained(folder, attention={"middle": PERFORMER})
