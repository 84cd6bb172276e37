"""Exported folders, opened by transformers in PyTorch with the code that they carry: the same logits and tokens.

Rows are padded on either side, so positions, groups and convolutions of the rows of a batch do not stand side by side.
"""

import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from support.cells import cells, some_of
from support.exported import (  # noqa: F401 - fixtures
    AUGMENTED,
    CASES,
    FLAGSHIP,
    GROUP,
    SIZES,
    SMALL,
    THOROUGH,
    Case,
    code_folder,
    one_thread,
    opened,
    random_model,
)
from support.golden_files import assert_close
from support.try_export import try_folder, write_exports
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from lin_jax.attention import REGISTRY, parse_name
from lin_jax.attention.registry import _BUILT_IN
from lin_jax.data import Tokenizer, load_tokenizer
from lin_jax.decoding import Generator
from lin_jax.errors import UserError
from lin_jax.hub import from_pretrained, save_pretrained
from lin_jax.hub.export import ATTENTIONS, architectures, auto_map, has_source, write_remote_code
from lin_jax.hub.export.torch_source import versions_lin_jax as versions
from lin_jax.hub.families.registry import FAMILIES, family_of_model
from lin_jax.hub.tensors import named
from lin_jax.models import RotaryConfig
from lin_jax.models.rotary import rotary_table

LENGTH, PROMPT = 24, 14


@cache
def batch() -> tuple[np.ndarray, np.ndarray]:
    """Prompts of 14, 5 and 11 tokens, and where they are real: padded on the left."""
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (3, PROMPT))
    return tokens, np.arange(PROMPT) >= PROMPT - np.array([[14], [5], [11]])


def continued(model: PreTrainedModel, tokens: np.ndarray, mask: np.ndarray, **options: Any) -> Any:
    greedy = {"max_new_tokens": LENGTH - PROMPT, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    inputs = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}
    return model.generate(**inputs, **greedy | options, return_dict_in_generate=True)


def their_logits(model: PreTrainedModel, tokens: np.ndarray, mask: np.ndarray | None = None, **options: Any) -> Any:
    with torch.no_grad():
        mask = None if mask is None else torch.tensor(mask)
        return model(torch.tensor(tokens), attention_mask=mask, **options).logits.double().numpy()


@jax.jit
def our_logits(model: Any, tokens: jax.Array, real: jax.Array) -> jax.Array:
    return model(tokens, real)


@jax.jit
def our_logits_on_state(model: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    return model.logits(model.prefill(tokens, lengths, model.init_state(*tokens.shape))[0])


def integers(array: np.ndarray) -> jax.Array:
    return jnp.asarray(array.astype(np.int32))


# Of further names of the same parts.
FURTHER = [CASES[1], CASES[2], CASES[4], CASES[11]]


@pytest.mark.parametrize("case", cells([case for case in CASES if case not in FURTHER], [*FURTHER, *THOROUGH]), ids=str)
def test_same_logits_and_tokens(case: Case, tmp_path: Path, x64: None) -> None:
    """Greedy text on the state, and logits of padded rows as a whole, and of parts of them on the state."""
    ours = case.model()
    theirs = opened(save_pretrained(ours, tmp_path / "model"))
    prompts, real = batch()
    tokens = continued(theirs, prompts, real).sequences.numpy()
    real = np.pad(real, ((0, 0), (0, LENGTH - PROMPT)), constant_values=True)
    expected = np.asarray(our_logits(ours, integers(tokens), integers(real)))[real]
    assert_close(their_logits(theirs, tokens, real, use_cache=False)[real], expected, "float64")

    if parse_name(case.attention).base == "yoso":  # Its state samples what is an expectation without one.
        order = np.argsort(~real, axis=1, kind="stable")
        tokens_first, real_first = (np.take_along_axis(part, order, axis=1) for part in (tokens, real))
        on_state = our_logits_on_state(ours, integers(tokens_first), integers(real.sum(1)))
        expected = np.asarray(on_state)[real_first]
    assert_close(in_parts(theirs, tokens, real, (9, 1, 14))[real], expected, "float64")
    chosen = np.zeros_like(real)
    chosen[:, PROMPT - 1 : -1] = True
    assert np.array_equal(expected[chosen[real]].argmax(-1), tokens[:, PROMPT:].ravel())


def in_parts(model: PreTrainedModel, tokens: np.ndarray, real: np.ndarray, parts: tuple[int, ...]) -> np.ndarray:
    """Logits of rows that are fed to the state part by part."""
    past, found, end = None, [], 0
    for part in parts:
        begin, end = end, end + part
        inputs = torch.tensor(tokens[:, begin:end]), torch.tensor(real[:, :end])
        with torch.no_grad():
            outputs = model(*inputs, past_key_values=past, use_cache=True)
        past = outputs.past_key_values
        found.append(outputs.logits.numpy())
    return np.concatenate(found, axis=1)


def test_every_attention_is_compared() -> None:
    assert {parse_name(case.attention).base for case in CASES + THOROUGH} == set(REGISTRY)


@pytest.mark.parametrize("case", some_of([case for case in CASES if not case.has_growing_state], 2), ids=str)
def test_the_state_does_not_grow(case: Case, tmp_path: Path) -> None:
    theirs = opened(save_pretrained(case.model("float32"), tmp_path / "model"), torch.float32)
    tokens = torch.randint(0, SIZES["vocab_size"], (1, 64))
    with torch.no_grad():
        sizes = [theirs(tokens[:, :count], use_cache=True).past_key_values.nbytes for count in (8, 64)]
    assert sizes[0] == sizes[1]


def test_generators_agree(tmp_path: Path, x64: None) -> None:
    """And a row of a batch has the text that it has alone."""
    ours = FLAGSHIP.model()
    theirs = opened(save_pretrained(ours, tmp_path / "model"))
    prompts, real = batch()
    texts = [row[mask].tolist() for row, mask in zip(prompts, real, strict=True)]
    found = continued(theirs, prompts, real).sequences[:, PROMPT:].tolist()
    assert found == Generator(ours, prefill_chunk_size=16).generate(texts, LENGTH - PROMPT).tokens
    for text, expected in zip(texts, found, strict=True):
        row = np.array([text])
        assert continued(theirs, row, np.ones_like(row)).sequences[0, len(text) :].tolist() == expected


def test_padding_on_the_right(tmp_path: Path) -> None:
    """Rows of a batch have the logits that they have alone; those of padding are zero."""
    theirs = opened(save_pretrained(AUGMENTED.model("float32"), tmp_path / "model"))
    tokens, real = (part[:, ::-1].copy() for part in batch())
    found = their_logits(theirs, tokens, real)
    for row, text, mask in zip(found, tokens, real, strict=True):
        assert_close(row[mask], their_logits(theirs, text[None, mask])[0], "float64")
    assert not found[~real].any()


def test_beams_and_samples(tmp_path: Path) -> None:
    """Beam search picks among states as it does among texts that are read anew; samples repeat with their seed."""
    theirs = opened(save_pretrained(AUGMENTED.model("float32"), tmp_path / "model"))
    beams = [continued(theirs, *batch(), num_beams=3, use_cache=state).sequences for state in (True, False)]
    assert torch.equal(*beams)
    samples = []
    for _ in range(2):
        torch.manual_seed(0)
        samples.append(continued(theirs, *batch(), do_sample=True, num_return_sequences=2).sequences)
    assert samples[0].shape == (6, LENGTH)
    assert torch.equal(*samples)


WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", cells([FLAGSHIP], [AUGMENTED]), ids=str)
def test_every_step_sees_the_text(case: Case, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of `generate` after the first gives one token, on a state that has consumed all before it."""
    theirs = opened(save_pretrained(case.model("float32"), tmp_path / "model"), torch.float32)
    steps, run = [], type(theirs.base_model)._run

    def counted(model: Any, padding: Any, x: torch.Tensor, state: Any) -> Any:
        consumed = torch.zeros(len(x), dtype=torch.int) if state.position is None else state.position
        steps.append((state.length, x.shape[1], consumed.tolist()))
        return run(model, padding, x, state)

    monkeypatch.setattr(type(theirs.base_model), "_run", counted)
    tokens, real = batch()
    continued(theirs, tokens, real, **WAYS[way])
    assert [step[:2] for step in steps] == [(0, PROMPT), *((length, 1) for length in range(PROMPT, LENGTH - 1))]
    for length, _, consumed in steps[1:]:
        rows = np.repeat(real.sum(1) + length - PROMPT, len(consumed) // len(real))
        assert consumed == rows.tolist()


def test_the_state_under_any_name(tmp_path: Path) -> None:
    """`forward` takes it by the names of old and of new versions of transformers, and of those to come."""
    theirs = opened(save_pretrained(FLAGSHIP.model("float32"), tmp_path / "model"), torch.float32)
    tokens, real = batch()
    expected = their_logits(theirs, tokens, real, use_cache=False)[:, 9:]

    def first() -> Any:
        with torch.no_grad():
            return theirs(torch.tensor(tokens[:, :9]), attention_mask=torch.tensor(real[:, :9]), use_cache=True)

    found = []
    for name in ("cache", "past_key_values", "a_name_to_come"):
        state = first().past_key_values
        found.append(their_logits(theirs, tokens[:, 9:], real, **{name: state}))
        assert state.length == PROMPT
    for each in found:
        assert np.array_equal(each, found[0])
        assert_close(each, expected, "float32")
    state = first().past_key_values
    assert np.array_equal(their_logits(theirs, tokens[:, 9:], real, cache=state, past_key_values=state), found[0])
    with pytest.raises(ValueError, match="two states were given; give one"):
        their_logits(theirs, tokens[:, 9:], real, cache=state, past_key_values=first().past_key_values)
    with pytest.raises(TypeError, match="the state is a DynamicCache; give the one that an earlier call returned"):
        their_logits(theirs, tokens, real, past_key_values=DynamicCache())


def test_a_state_that_is_not_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No text comes of it but an error, in `generate` and in `forward`."""
    theirs = opened(save_pretrained(FLAGSHIP.model("float32"), tmp_path / "model"), torch.float32)
    update = type(theirs)._update_model_kwargs_for_generation

    def forgetful(model: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        updated = update(model, *arguments, **options)
        return {name: value for name, value in updated.items() if name not in ("cache", "past_key_values")}

    monkeypatch.setattr(type(theirs), "_update_model_kwargs_for_generation", forgetful)
    tokens, real = batch()
    for inputs in ((tokens, real), (tokens[:1], real[:1])):  # padded, and without a mask
        with pytest.raises(
            RuntimeError, match=r"1 of 15 tokens and a state of 0: transformers .* install one of 4\.57 to"
        ):
            continued(theirs, *inputs)
    continued(theirs, tokens, real, use_cache=False)
    with pytest.raises(
        ValueError, match="attention_mask is of 14 tokens, but 1 came with a state of 0; give the state"
    ):
        their_logits(theirs, tokens[:, -1:], real)


def test_a_text_is_continued_on_its_state(tmp_path: Path) -> None:
    """`generate` takes what it returned, with the whole text."""
    theirs = opened(save_pretrained(AUGMENTED.model("float32"), tmp_path / "model"), torch.float32)
    tokens, real = batch()
    expected = continued(theirs, tokens, real).sequences
    first = continued(theirs, tokens, real, max_new_tokens=4)
    longer = np.pad(real, ((0, 0), (0, 4)), constant_values=True)
    state = {name: first[name] for name in ("cache", "past_key_values") if name in first.keys()}  # noqa: SIM118
    second = continued(theirs, first.sequences.numpy(), longer, **state, max_new_tokens=6)
    assert torch.equal(second.sequences, expected)


def test_versions_of_transformers() -> None:
    """Too old ones are refused in one line, newer ones than were tried are warned about."""
    for installed in ("4.57.6", "5.0.0", "5.24.0", "6.0.0.dev0"):
        versions.require_version(installed)
    with pytest.raises(
        ImportError, match=r"^this model needs transformers 4\.57 or newer, not 4\.56\.2; install one of .*$"
    ):
        versions.require_version("4.56.2")
    newest = versions.NEWEST
    versions.warn_if_untried(f"{newest}.9")
    major, minor = newest.split(".")
    for installed in (f"{major}.{int(minor) + 1}.0.dev0", f"{int(major) + 1}.0"):
        with pytest.warns(
            UserWarning, match=f"never tried with transformers {re.escape(installed)}, only with 4.57 to"
        ):
            versions.warn_if_untried(installed)


def test_an_untried_version_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = opened(save_pretrained(FLAGSHIP.model("float32"), tmp_path / "model"), torch.float32)
    monkeypatch.setattr("transformers.__version__", "99.1")
    with pytest.warns(UserWarning, match=r"never tried with transformers 99\.1"):
        continued(theirs, *batch())


WAYS_OF_FAMILIES = [
    "llama-augmented",
    "flash-performer+local+convolution",
    "t5-augmented",
    "gpt2-augmented",
    "gpt2-softmax",
]


@pytest.mark.thorough
@pytest.mark.parametrize("name", WAYS_OF_FAMILIES)
def test_a_folder_is_tried_in_any_environment(name: str, tmp_path: Path, x64: None) -> None:
    """The script that compares ways to generate finds none that differs, and what cannot be is said in a line."""
    cells = try_folder(*write_exports(tmp_path, [name]))
    assert len(cells) == 12
    if "softmax" not in name:
        assert "not supported with stateful models" in cells.pop("assistant")
    else:
        assert all("not used by the model" in cells.pop(each) for each in ("speculative", "speculative, batched"))
    assert set(cells.values()) == {"equal"}


def test_a_linearized_assistant_is_refused(tmp_path: Path) -> None:
    assistant = opened(save_pretrained(FLAGSHIP.model("float32"), tmp_path / "assistant"))
    theirs = opened(save_pretrained(Case("softmax").model("float32"), tmp_path / "model"))
    with pytest.raises(NotImplementedError, match="a linearized model cannot be an assistant"):
        continued(theirs, *(part[:1] for part in batch()), assistant_model=assistant)


def small_tokenizer() -> Tokenizer:
    return Tokenizer.train(["the wind and the sea, the sun and the rain. "] * 20, 270)


def test_the_tokenizer_of_old_versions(tmp_path: Path) -> None:
    """transformers 4 knows its class and its special tokens; 5 reads the same; written anew and copied."""
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    small_tokenizer().save(first)
    pretrained = AutoTokenizer.from_pretrained(first)
    pretrained.add_special_tokens({"extra_special_tokens": ["<|user|>"]})
    pretrained.save_pretrained(first)
    save_pretrained(FLAGSHIP.model("float32"), second, tokenizer=load_tokenizer(first))
    save_pretrained(FLAGSHIP.model("float32"), third, tokenizer=first)
    text = "the wind<|user|> and the sea"
    for folder in (second, third):
        written = json.loads((folder / "tokenizer_config.json").read_text())
        assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert written["additional_special_tokens"] == ["<|user|>"]
        assert not {"extra_special_tokens", "is_local", "local_files_only"} & set(written)
        again = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert again(text).input_ids == pretrained(text).input_ids == load_tokenizer(folder).encode(text).tolist()
        assert again.all_special_tokens == pretrained.all_special_tokens


@pytest.mark.parametrize(
    "case",
    cells(
        [Case("performer+local+convolution")],
        [
            Case("exponential+window", sizes={"decay": "token"}),
            Case("hedgehog+window+convolution", sizes={"window": 6, "decay": "constant"}),
            Case("augmented", sizes={"decay": "constant"}),
        ],
    ),
    ids=str,
)
def test_gradients(case: Case, tmp_path: Path, x64: None) -> None:
    """Fine-tuning in PyTorch follows the same gradients."""
    ours = case.model()
    theirs = opened(save_pretrained(ours, tmp_path / "model")).train()
    tokens = batch()[0]

    def loss(model: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(model(tokens)[:, :-1], tokens[:, 1:]).mean()

    outputs = theirs(torch.tensor(tokens), labels=torch.tensor(tokens))
    torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), torch.tensor(tokens[:, 1:]).flatten()
    ).backward()
    value, gradients = nnx.jit(nnx.value_and_grad(loss))(ours)
    assert outputs.past_key_values is None
    assert_close(outputs.loss.detach().numpy(), np.asarray(value), "float32")
    expected = named(gradients, family_of_model(ours).entries(ours))
    assert set(expected) == {name for name, _ in theirs.named_parameters()}
    for name, parameter in theirs.named_parameters():
        assert_close(parameter.grad.numpy(), expected[name], "float64")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_types(dtype: str, tmp_path: Path) -> None:
    """Sums are taken in float32 at least; random directions are never rounded."""
    ours = Case("performer+local+convolution").model(dtype)
    theirs = opened(save_pretrained(ours, tmp_path / "model"), getattr(torch, dtype))
    prompts, real = batch()
    expected = np.asarray(our_logits(ours, integers(prompts), integers(real)))[real]
    found = their_logits(theirs, prompts, real)[real]
    if dtype == "float32":
        assert_close(found, expected, dtype)
    else:
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.05 * np.abs(expected).max())
    assert {name: buffer.dtype for name, buffer in theirs.named_buffers()} == {
        f"model.layers.{layer}.self_attn.mixer.projection": torch.float32 for layer in range(2)
    }
    with torch.no_grad():
        sums = theirs(torch.tensor(prompts), use_cache=True).past_key_values.states[0]["attention"]["memory"]
    assert sums.dtype == torch.float32


# Softmax over a window has a type of transformers' own, but with sinks.
SINKS = Case("softmax", sizes={"window": 5, "sinks": 2})


@pytest.mark.parametrize("case", [FLAGSHIP, Case("yoso+local", "gpt2"), SINKS], ids=str)
def test_saved_by_transformers(case: Case, tmp_path: Path) -> None:
    """A folder that transformers writes holds the code and the numbers once more, for PyTorch and for us."""
    ours = case.model("float32")
    first = opened(save_pretrained(ours, tmp_path / "first"), torch.float32)
    first.save_pretrained(tmp_path / "second")
    second = opened(tmp_path / "second", torch.float32)
    assert {path.name for path in (tmp_path / "second").glob("*.py")} == {
        path.name for path in (tmp_path / "first").glob("*.py")
    }
    tokens, real = batch()
    assert np.array_equal(their_logits(first, tokens, real), their_logits(second, tokens, real))
    assert second.config.attention == first.config.attention
    again = from_pretrained(tmp_path / "second")
    assert again.config.attention == ours.config.attention
    for (path, mine), (_, theirs) in zip(*(nnx.to_flat_state(nnx.state(each)) for each in (ours, again)), strict=True):
        assert np.array_equal(mine[...], theirs[...]), path


@pytest.mark.parametrize("case", [FLAGSHIP, Case("linformer+local"), Case("rfa", "gpt2")], ids=str)
def test_a_model_from_its_configuration(case: Case, tmp_path: Path) -> None:
    """Without weights, everything begins as here: factors and taps at zero, projections drawn."""
    config = opened(save_pretrained(case.model("float32"), tmp_path / "model"), torch.float32).config
    fresh = dict(AutoModelForCausalLM.from_config(config, trust_remote_code=True).state_dict())
    assert all(torch.isfinite(tensor).all() for tensor in fresh.values())
    for name, tensor in fresh.items():
        at_zero = name.endswith(("bias", "factor", "dwconv.weight"))
        assert bool(tensor.any()) is not at_zero, name
        if name.endswith("key_projection"):
            assert torch.equal(tensor, torch.tensor([[0.5, 0], [0.5, 0], [0, 0.5], [0, 0.5]]))


SCALED = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 4.0, "beta_fast": 8.0, "beta_slow": 0.5},
    "longrope": {"short_factor": (1.0, 1.3), "long_factor": (1.5, 4.0), "factor": 4.0},
    "llama3": {"factor": 8.0},
    "proportional": {"partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("scaling", SCALED)
def test_rotary_scalings(scaling: str, tmp_path: Path) -> None:
    length = 64 if scaling == "dynamic" else 256
    rotary = RotaryConfig(1000.0, scaling, original_context_length=64, context_length=length, **SCALED[scaling])
    ours = Case("flash_local", options={"rotary": rotary}).model("float32")
    theirs = opened(save_pretrained(ours, tmp_path / "model"), torch.float32)
    # Where transformers 4 looks for it, and 5 as well.
    assert json.loads((tmp_path / "model" / "config.json").read_text())["rope_scaling"]["rope_type"] == scaling
    positions = np.arange(100)[None]
    found = sys.modules[type(theirs).__module__].rotations_at(torch.tensor(positions), theirs.config, torch.float32)
    for part, expected in zip(found, rotary_table(jnp.asarray(positions), 4, rotary, jnp.float32), strict=True):
        assert_close(part[:, :, 0].numpy(), np.asarray(expected), "float32")


def test_the_files(tmp_path: Path) -> None:
    """What `auto_map` names is in the folder, and what the files need of each other."""
    assert auto_map("gpt2")["AutoConfig"] == "configuration_lin_jax.LinJaxGPT2Config"
    assert architectures("gpt2") == ["LinJaxGPT2LMHeadModel"]
    for family in FAMILIES:
        folder = tmp_path / family
        folder.mkdir()
        write_remote_code(folder, family)
        for place in auto_map(family).values():
            module, name = place.split(".")
            assert f"class {name}(" in (folder / f"{module}.py").read_text()
            if module.startswith("modeling"):  # From a folder, transformers 4.57 copies what this file names, no more.
                named = re.findall(r"^from \.(\w+) import", (folder / f"{module}.py").read_text(), flags=re.MULTILINE)
                assert {*named, module} == {path.stem for path in folder.glob("*.py")}
    with pytest.raises(
        UserError, match="of the family 'opt' cannot be opened in PyTorch; llama, gpt2, bert, flash and t5 can"
    ):
        write_remote_code(tmp_path, "opt")


def test_the_attentions_that_the_code_has() -> None:
    """All of this package's, and no other: one that somebody registered opens in JAX alone."""
    assert {*ATTENTIONS} == {*_BUILT_IN}
    assert has_source("llama", "Llama", ["relu"])
    assert not has_source("llama", "Llama", ["relu", "my_own"])
