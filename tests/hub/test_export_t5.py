"""Exported T5s in plain transformers: the same logits and greedy texts, with padded sources; and in JAX again."""

import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from support.cells import cells
from support.exported import SMALL, code_folder, one_thread, random_model  # noqa: F401 - fixtures
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from lin_jax.attention import REGISTRY, AttentionConfig, parse_name
from lin_jax.decoding import Generator
from lin_jax.hub import from_pretrained, save_pretrained
from lin_jax.models import T5, T5Classifier, T5Config

SIZES = {
    "vocab_size": 23,
    "hidden_size": 16,
    "head_dim": 6,
    "intermediate_size": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "buckets": 8,
    "max_distance": 10,
    "norm_eps": 1e-3,
}
GATED = {"feed_forward": "gated-gelu", "tie_embeddings": False, "num_decoder_layers": 1}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("exponential+window+convolution", GATED),
]
THOROUGH: list[tuple[str, dict[str, Any]]] = [
    ("augmented", {}),
    ("performer+local+convolution", GATED),
    ("transnormer+local", {}),
    ("square+convolution", {}),
    ("softmax+local", GATED),
    ("flash_local", {}),
    ("flash_global", GATED),
    ("flash+convolution", {}),
    ("linear_angular+convolution", {}),
    ("linformer+local+convolution", {}),
    ("yoso+local", {}),
    ("relu", {}),
    ("elu+local", {}),
    ("hedgehog+window", GATED),
    ("hedgehog", {}),
    ("exponential", {}),
    ("rfa+local", {}),
]
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def build(name: str, kind: type = T5, dtype: str = "float64", decoder: dict[str, Any] = {}, **options: Any) -> Any:  # noqa: B006
    """A T5 with an attention in the encoder, in the decoder with more sizes, and between them where it can be."""
    attention = AttentionConfig(name, **SMALL)
    cross = attention if "cross" in REGISTRY[parse_name(name).base].forms else AttentionConfig("softmax")
    parts = {
        "encoder_attention": attention,
        "decoder_attention": AttentionConfig(name, **SMALL | decoder),
        "cross_attention": cross,
    }
    types = {"dtype": dtype, "param_dtype": dtype}
    return random_model(lambda: kind(T5Config(**SIZES | options, **types, **parts), rngs=nnx.Rngs(0)))


def sources() -> tuple[np.ndarray, np.ndarray]:
    """Rows that are padded behind, in front and nowhere, and their mask."""
    draw, places = np.random.default_rng(0), np.arange(11)
    return draw.integers(2, 23, (3, 11)), np.stack([places < 9, places >= 5, places >= 0])


def opened(folder: Path, dtype: torch.dtype = torch.float64, automatic: Any = AutoModelForSeq2SeqLM) -> Any:
    return automatic.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()


def inputs() -> dict[str, torch.Tensor]:
    tokens, mask = sources()
    return {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask).long()}


def assert_same_state(one: nnx.Module, other: nnx.Module) -> None:
    first, second = (dict(nnx.to_flat_state(nnx.state(model))) for model in (one, other))
    assert set(first) == set(second)
    for path, value in first.items():
        assert np.array_equal(value[...], second[path][...]), path


@pytest.mark.parametrize(("name", "options"), cells(CASES, THOROUGH), ids=str)
def test_same_logits_and_texts(name: str, options: dict[str, Any], tmp_path: Path, x64: None) -> None:
    check(build(name, **options), tmp_path)


@pytest.mark.parametrize(
    ("name", "decoder"),
    cells(
        [("exponential+window", {"window": 5, "decay": "token", "sinks": 2})],
        [
            ("softmax", {"window": 5}),
            ("softmax", {"window": 4, "sinks": 3}),
            ("exponential+window", {"window": 5, "decay": "token"}),
            ("rfa", {"decay": "constant"}),
        ],
    ),
    ids=str,
)
def test_decoders_that_forget(name: str, decoder: dict[str, Any], tmp_path: Path, x64: None) -> None:
    """Windows, sinks and decay are for the decoder alone."""
    check(build(name, decoder=decoder), tmp_path)


def check(ours: T5, place: Path) -> None:
    folder = save_pretrained(ours, place / "model")
    theirs = opened(folder)
    tokens, mask = (jnp.asarray(part.astype(np.int32)) for part in sources())
    given = np.random.default_rng(1).integers(2, 23, (3, 14))
    reading = ours.condition(tokens, mask)
    expected = np.asarray(reading(jnp.asarray(given.astype(np.int32))))
    with torch.no_grad():
        found = theirs(**inputs(), decoder_input_ids=torch.tensor(given)).logits.numpy()
    assert np.abs(found - expected).max() < 1e-9

    texts = theirs.generate(**inputs(), **GREEDY)
    assert texts[:, 1:].tolist() == Generator(reading, prefill_chunk_size=8).generate([[0]] * 3, 12).tokens
    again = from_pretrained(folder, dtype="float64", param_dtype="float64")
    assert again.config == ours.config
    assert_same_state(again, ours)


@pytest.fixture(scope="module")
def model(code_folder: None, tmp_path_factory: pytest.TempPathFactory) -> Any:  # noqa: F811
    return opened(save_pretrained(build("augmented", dtype="float32"), tmp_path_factory.mktemp("case") / "model"))


class TestGeneration:
    """What `generate` can do with a T5 is compared with whole passes in `test_export`; here what else holds."""

    def test_the_state_does_not_grow(self, model: Any) -> None:
        sizes = []
        for count in (4, 40):
            with torch.no_grad():
                tokens = torch.randint(2, 23, (3, count))
                sizes.append(model(**inputs(), decoder_input_ids=tokens, use_cache=True).past_key_values.nbytes)
        assert sizes[0] == sizes[1]

    def test_a_state_is_enough(self, model: Any) -> None:
        """It holds what the decoder reads of the encoder; padding of the decoder never enters it."""
        tokens = torch.randint(2, 23, (3, 12))
        mask = torch.ones_like(tokens)
        mask[1, :4] = 0
        with torch.no_grad():
            whole = model(**inputs(), decoder_input_ids=tokens, decoder_attention_mask=mask).logits
            first = model(
                **inputs(), decoder_input_ids=tokens[:, :5], decoder_attention_mask=mask[:, :5], use_cache=True
            )
            second = model(
                decoder_input_ids=tokens[:, 5:], decoder_attention_mask=mask, past_key_values=first.past_key_values
            )
            source = {name: part[1:2] for name, part in inputs().items()}
            alone = model(**source, decoder_input_ids=tokens[1:2, 4:]).logits
        assert (second.logits - whole[:, 5:]).abs().max() < 1e-9
        assert (alone - whole[1:2, 4:]).abs().max() < 1e-9
        with pytest.raises(ValueError, match="nothing to read; give input_ids, or encoder_outputs"):
            model(decoder_input_ids=tokens)

    def test_drafts_are_verified(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Guesses that are right for a while, and wrong ones behind them, leave the texts and the state."""
        plain = model.generate(**inputs(), **GREEDY, return_dict_in_generate=True)
        texts, passes = plain.sequences.tolist(), []
        drafts = sys.modules[f"{type(model).__module__.rpartition('.')[0]}.speculation_lin_jax"]._Drafts

        def following(self: Any, hidden: torch.Tensor, room: int) -> list[int]:
            done = len(self.ngrams.tokens)
            text = next(text for text in texts if text[:done] == self.ngrams.tokens)
            right = text[done : done + min(len(passes) % 4, room)]
            wrong = [(text[done + len(right)] + 1) % 23] if len(right) < room else []
            passes.append(len(right))
            self.guesses = [*right, *wrong]
            return self.guesses

        monkeypatch.setattr(drafts, "next", following)
        fast = model.generate(**inputs(), **GREEDY, return_dict_in_generate=True, speculative=True)
        assert fast.sequences.tolist() == texts
        assert len(passes) < 3 * 8
        assert fast.past_key_values.position.tolist() == plain.past_key_values.position.tolist()

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"do_sample": True}, "it is greedy; leave sampling and beams out"),
            ({"num_beams": 2}, "it is greedy; leave sampling and beams out"),
            ({"assistant_model": "itself"}, "it drafts by itself; leave assistant_model"),
        ],
        ids=str,
    )
    def test_what_speculation_cannot_do_is_said(self, model: Any, options: dict[str, Any], reason: str) -> None:
        source = {name: part[:1] for name, part in inputs().items()}
        if "assistant_model" in options:
            options = {"assistant_model": model}
        with pytest.raises(ValueError, match=f"^no speculation: {reason}.*, or leave speculative out$"):
            model.generate(**source, **GREEDY | options, speculative=True)
        with pytest.raises(ValueError, match="num_return_sequences"):  # which no greedy text has in transformers
            model.generate(**source, **GREEDY, num_return_sequences=2, speculative=True)

    def test_it_is_no_assistant(self, model: Any, tmp_path: Path) -> None:
        plain = opened(save_pretrained(build("softmax", dtype="float32"), tmp_path / "model"))
        source = {name: part[:1] for name, part in inputs().items()}
        with pytest.raises(NotImplementedError, match="a linearized model cannot be an assistant"):
            plain.generate(**source, **GREEDY, assistant_model=model)


@pytest.mark.parametrize("end", cells([1], [9]))
def test_a_classifier(end: int, tmp_path: Path, x64: None) -> None:
    """By its automatic class, with end tokens and without, and its loss; and in JAX again."""
    ours = build("performer+local", T5Classifier, end_token=end, num_labels=3)
    folder = save_pretrained(ours, tmp_path / "model")
    theirs = opened(folder, automatic=AutoModelForSequenceClassification)
    tokens, mask = (jnp.asarray(part.astype(np.int32)) for part in sources())
    expected, labels = np.asarray(ours(tokens, mask)), torch.tensor([0, 2, 1])
    found = theirs(**inputs(), labels=labels)
    assert np.abs(found.logits.detach().numpy() - expected).max() < 1e-9
    assert abs(found.loss - torch.nn.functional.cross_entropy(torch.tensor(expected), labels)) < 1e-9
    again = from_pretrained(folder, dtype="float64", param_dtype="float64")
    assert type(again) is T5Classifier
    assert_same_state(again, ours)
    card = (folder / "README.md").read_text()
    assert 'AutoModelForSequenceClassification.from_pretrained("FOLDER", trust_remote_code=True)' in card
    assert "speculative" not in card


@pytest.mark.parametrize("options", cells([{}], [GATED]), ids=["tied", "untied"])
def test_trained_and_saved_by_transformers(options: dict[str, Any], tmp_path: Path) -> None:
    """The loss is that of labels one place later; a folder that PyTorch writes opens there and in JAX."""
    ours = build("augmented", dtype="float32", **options)
    theirs = opened(save_pretrained(ours, tmp_path / "first"), torch.float32)
    labels = torch.randint(2, 23, (3, 7))
    labels[0, 5:] = -100
    outputs = theirs(**inputs(), labels=labels)
    given = theirs.prepare_decoder_input_ids_from_labels(labels)
    assert given[:, 0].tolist() == [0, 0, 0]
    assert given[0].tolist() == [0, *labels[0, :5].tolist(), 0]
    outputs.loss.backward()
    expected = torch.nn.functional.cross_entropy(outputs.logits.transpose(1, 2), labels)
    assert abs((outputs.loss - expected).item()) < 1e-5
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter -= 0.1 * parameter.grad
    theirs.save_pretrained(tmp_path / "second")
    again = from_pretrained(tmp_path / "second")
    assert again.config == ours.config
    assert_same_state(again, from_pretrained(save_pretrained(again, tmp_path / "third")))
    second = opened(tmp_path / "second", torch.float32)
    assert {name: tensor.tolist() for name, tensor in second.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in theirs.state_dict().items()
    }
    with torch.no_grad():
        vectors = opened(tmp_path / "second", torch.float32, AutoModel)(**inputs(), decoder_input_ids=given)
        logits = second(**inputs(), decoder_input_ids=given).logits
    read = vectors.last_hidden_state * (1 if options else 16**-0.5)
    torch.testing.assert_close(second.lm_head(read), logits)


def test_a_model_from_its_configuration(tmp_path: Path) -> None:
    """Without weights, layers begin as here: queries small, factors and taps at zero, no more than one embedding."""
    config = opened(save_pretrained(build("augmented", dtype="float32"), tmp_path / "model")).config
    torch.manual_seed(0)
    fresh = AutoModelForSeq2SeqLM.from_config(config, trust_remote_code=True)
    assert fresh.lm_head.weight is fresh.shared.weight
    layer = fresh.decoder.block[0].layer
    for part in (layer[0].SelfAttention, layer[1].EncDecAttention):
        assert abs(part.q.weight.std() / (16 * 6) ** -0.5 - 1) < 0.3
        assert abs(part.k.weight.std() / 16**-0.5 - 1) < 0.3
        assert not part.alpha.any()
    assert not layer[0].SelfAttention.dwconv.weight.any()
    assert abs(fresh.shared.weight.std() - 1) < 0.3
