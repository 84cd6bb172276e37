"""The T5: against transformers' own in PyTorch, and what the published linear T5 cannot do.

For float64, transformers runs with a `torch` in which single precision means double, since its norm names float32.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from flax import nnx
from support.cells import some_of
from support.golden_files import assert_close
from transformers.models.t5 import modeling_t5

from lin_jax.attention import AttentionConfig, tree_arrays
from lin_jax.decoding import Generator, NgramDrafter
from lin_jax.errors import UserError
from lin_jax.hub.families.t5 import config_from_huggingface, config_to_huggingface, entries, read_t5
from lin_jax.hub.tensors import named, uncovered
from lin_jax.models import T5, T5Classifier, T5Config

VOCABULARY, GROUP = 23, 4
SOURCE = np.array([11, 5, 7])  # Lengths of the sources, none of them a multiple of the group.
SIZES = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "decoder_start_token_id": 0,
    "attn_implementation": "eager",
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "relu_tied": {},
    "gated_untied": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
}
# How the layers are run changes nothing.
LOOPS: dict[str, dict[str, Any]] = {"relu_tied": {}, "gated_untied": {"remat": True, "unroll": 2}}
# Encoder, decoder and cross-attention.
ATTENTIONS = {
    "augmented": ("augmented", "augmented", "augmented"),
    "mixed": ("linformer", "performer+local+convolution", "performer"),
}


class DoubleTorch:
    """PyTorch, but `float32` is double precision."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def double(x64: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both models calculate in float64 throughout."""
    monkeypatch.setattr(modeling_t5, "torch", DoubleTorch())
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def draw_tokens(*shape: int, seed: int = 2) -> np.ndarray:
    """Tokens that are neither padding nor an end."""
    return np.random.default_rng(seed).integers(2, VOCABULARY, shape)


def sources(seed: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Rows of unequal length, with anything where they are padded, and their mask."""
    return draw_tokens(len(SOURCE), SOURCE.max(), seed=seed), np.arange(SOURCE.max()) < SOURCE[:, None]


def their_model(kind: Any, **options: Any) -> Any:
    """transformers' T5 with weights large enough for every part to matter."""
    torch.manual_seed(0)
    config = transformers.T5Config(**SIZES | options)
    model = kind(config).eval()
    if options.get("tie_word_embeddings") is False:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=float(parameter.ndim == 1), std=0.3)
    return model


def our_model(kind: Any, theirs: Any, **options: Any) -> Any:
    config = config_from_huggingface(theirs.config.to_dict())
    config = replace(config, dtype="float64", param_dtype="float64", **options)
    model = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))
    read_t5(model, {name: tensor.numpy() for name, tensor in theirs.state_dict().items()})
    return model


def assert_gradients(gradients: nnx.State, model: Any, theirs: Any) -> None:
    found = named(gradients, entries(model))
    expected = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert_close(found[name], gradient, "float64")


@jax.jit
@nnx.value_and_grad(has_aux=True)
def loss_and_logits(model: T5, tokens: jax.Array, mask: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = model(tokens, model.decoder_inputs(labels), mask)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return losses.mean(where=labels >= 0), logits


@pytest.mark.parametrize("name", some_of(ARCHITECTURES, 1))
def test_logits_loss_and_gradients(name: str, double: None) -> None:
    theirs = their_model(transformers.T5ForConditionalGeneration, **ARCHITECTURES[name])
    ours = our_model(T5, theirs, **LOOPS[name])
    tokens, mask = sources()
    labels = draw_tokens(3, 9, seed=3)
    labels[0, 6:] = -100
    outputs = theirs(torch.tensor(tokens), attention_mask=torch.tensor(mask).long(), labels=torch.tensor(labels))
    outputs.loss.backward()
    (loss, logits), gradients = loss_and_logits(ours, jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(labels))
    assert logits.dtype == loss.dtype == "float64"
    assert_close(logits, outputs.logits.detach().numpy(), "float64")
    assert_close(loss, np.asarray(outputs.loss.item()), "float64")
    assert_gradients(gradients, ours, theirs)


@jax.jit
@nnx.value_and_grad(has_aux=True)
def class_loss(
    model: T5Classifier, tokens: jax.Array, mask: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    logits = model(tokens, mask)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits


def test_classifier(double: None) -> None:
    """The vector at the last end token of each row counts, masked or not."""
    theirs = their_model(transformers.T5ForSequenceClassification, num_labels=5)
    ours = our_model(T5Classifier, theirs)
    tokens, mask = sources()
    tokens[~mask] = 0
    tokens[np.arange(3), SOURCE - 1] = tokens[:, 2] = 1
    labels = np.array([3, 0, 4])
    outputs = theirs(torch.tensor(tokens), attention_mask=torch.tensor(mask).long(), labels=torch.tensor(labels))
    outputs.loss.backward()
    (loss, logits), gradients = class_loss(ours, jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(labels))
    assert_close(logits, outputs.logits.detach().numpy(), "float64")
    assert_close(loss, np.asarray(outputs.loss.item()), "float64")
    assert_gradients(gradients, ours, theirs)


@pytest.mark.thorough
def test_classifier_without_end_tokens() -> None:
    """A row's last token that is present stands for its end."""
    tokens, mask = sources()
    tokens[np.arange(3), SOURCE - 1] = 1
    softmax = {f"{part}_attention": AttentionConfig("softmax") for part in ("encoder", "decoder", "cross")}
    some, none = (
        jax.jit(lambda model: model(jnp.asarray(tokens), jnp.asarray(mask)))(
            random_model(
                config("augmented", end_token=end, dtype="float32", param_dtype="float32", **softmax), T5Classifier
            )
        )
        for end in (1, VOCABULARY)
    )
    assert_close(some, np.asarray(none), "float32")


@pytest.mark.thorough
def test_greedy_generation(double: None) -> None:
    """Row by row, with drafts, what transformers generates; its cache has as many layers as the encoder."""
    theirs = their_model(transformers.T5ForConditionalGeneration, num_decoder_layers=2)
    tokens, mask = sources()
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(
        torch.tensor(tokens), attention_mask=torch.tensor(mask).long(), max_new_tokens=20, do_sample=False
    )
    decoder = condition(our_model(T5, theirs), jnp.asarray(tokens), jnp.asarray(mask))
    generation = Generator(decoder, drafter=NgramDrafter(depth=3), prefill_chunk_size=8).generate([[0]] * 3, 20)
    assert generation.tokens == expected[:, 1:].tolist()


def config(name: str, **options: Any) -> T5Config:
    encoder, decoder, cross = (AttentionConfig(part, GROUP, 5, features=6, rank=2) for part in ATTENTIONS[name])
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "head_dim": 6, "intermediate_size": 24, "num_heads": 2}
    rest = {"num_layers": 2, "buckets": 8, "max_distance": 10, "dtype": "float64", "param_dtype": "float64"}
    attentions = {"encoder_attention": encoder, "decoder_attention": decoder, "cross_attention": cross}
    return T5Config(**sizes | rest | attentions | options)


def random_model(config: T5Config, kind: Any = T5) -> Any:
    """Every parameter random and large enough to matter, also those that begin as constants."""
    model, rng = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))), np.random.default_rng(1)
    state = nnx.state(model)
    for path, leaf in nnx.to_flat_state(state):
        values = (path[-1] == "scale") + rng.normal(scale=0.5, size=leaf.shape)
        leaf.set_value(jnp.asarray(values, leaf.dtype))
    nnx.update(model, state)
    return model


@jax.jit
def condition(model: T5, tokens: jax.Array, mask: jax.Array | None) -> Any:
    return model.condition(tokens, mask)


@jax.jit
def forward(decoder: Any, tokens: jax.Array) -> jax.Array:
    return decoder(tokens)


@jax.jit
def prefill(decoder: Any, tokens: jax.Array, lengths: jax.Array) -> Any:
    return decoder.prefill(tokens, lengths, decoder.init_state(tokens.shape[0], 32))[1]


@jax.jit
def token_by_token(decoder: Any, tokens: jax.Array) -> jax.Array:
    batch = tokens.shape[0]

    def step(state: Any, token: jax.Array) -> tuple[Any, jax.Array]:
        hidden, nodes = decoder.verify(token[:, None], tree_arrays((-1,)), state)
        return decoder.commit(state, nodes, jnp.zeros((batch, 1), int), jnp.ones((batch,), int)), hidden[:, 0]

    hidden = jax.lax.scan(step, decoder.init_state(batch, 32), tokens.T)[1]
    return decoder.logits(jnp.moveaxis(hidden, 0, 1))


@jax.jit
def verify(decoder: Any, nodes: jax.Array, state: Any) -> jax.Array:
    return decoder.logits(decoder.verify(nodes, tree_arrays((-1, 0, 0, 1)), state)[0])


@pytest.mark.parametrize("name", some_of(ATTENTIONS, ("mixed",)))
def test_forms_agree(name: str, x64: None) -> None:
    """The whole row at once, token by token, and as a tree on states that stand at different places of a group."""
    tokens, mask = sources()
    decoder = condition(random_model(config(name)), jnp.asarray(tokens), jnp.asarray(mask))
    rows = jnp.asarray(draw_tokens(3, 11, seed=4))
    whole = forward(decoder, rows)
    assert_close(token_by_token(decoder, rows), np.asarray(whole), "float64")
    nodes, consumed = jnp.asarray(draw_tokens(3, 4, seed=5)), np.array([7, 6, 2])
    found = verify(decoder, nodes, prefill(decoder, rows, jnp.asarray(consumed)))
    for path in ([0, 1, 3], [0, 2]):
        joined = np.array(rows)
        for row, count in enumerate(consumed):
            joined[row, count : count + len(path)] = nodes[row, jnp.asarray(path)]
        expected = np.asarray(forward(decoder, jnp.asarray(joined)))
        for row, count in enumerate(consumed):
            assert_close(found[row, jnp.asarray(path)], expected[row, count : count + len(path)], "float64")


def test_speculation_is_lossless(x64: None) -> None:
    """Linear decoder, linear cross-attention: drafts change no token."""
    tokens, mask = (jnp.asarray(part) for part in sources())
    model = random_model(config("augmented"))
    decoder = condition(model, tokens, mask)
    plain = Generator(decoder, prefill_chunk_size=8).generate([[0]] * 3, 30)
    assert len({tuple(row) for row in plain.tokens}) == 3
    drafted = Generator(decoder, drafter=NgramDrafter(depth=3), prefill_chunk_size=8).generate([[0]] * 3, 30)
    assert drafted.tokens == plain.tokens
    assert drafted.mean_accepted_tokens > 1


def test_state_knows_nothing_of_the_source(x64: None) -> None:
    """Memories are an input of every pass; only what the decoder has read itself goes from step to step."""
    model = random_model(config("augmented", cross_attention=AttentionConfig("softmax")))

    def state(length: int) -> Any:
        decoder = model.condition(jnp.zeros((2, length), int))
        assert decoder.memories.keys.shape == (2, 2, length, 2, 6)
        return decoder.init_state(2, 16)

    assert jax.eval_shape(lambda: state(4)) == jax.eval_shape(lambda: state(9))


@pytest.mark.parametrize("name", some_of(ATTENTIONS, 1))
def test_padding_is_not_read(name: str, x64: None) -> None:
    """What padding holds changes nothing, and a row without its padding gives the same."""
    model = random_model(config(name))
    rows = jnp.asarray(draw_tokens(3, 6, seed=4))
    tokens, mask = sources()
    other = np.where(mask, tokens, draw_tokens(*tokens.shape, seed=9))
    run = jax.jit(lambda model, tokens, mask, rows: (model.encode(tokens, mask), model(tokens, rows, mask)))
    encoded, logits = run(model, jnp.asarray(tokens), jnp.asarray(mask), rows)
    encoded_other, logits_other = run(model, jnp.asarray(other), jnp.asarray(mask), rows)
    assert_close(encoded_other[mask], np.asarray(encoded[mask]), "float64")
    assert_close(logits_other, np.asarray(logits), "float64")
    alone = np.s_[1:2]
    encoded_alone, logits_alone = run(model, jnp.asarray(tokens[alone, : SOURCE[1]]), None, rows[alone])
    assert_close(encoded[alone, : SOURCE[1]], np.asarray(encoded_alone), "float64")
    assert_close(logits[alone], np.asarray(logits_alone), "float64")
    if name == "augmented":
        published = config(name, encoder_attention=AttentionConfig("augmented", GROUP, 5, convolve_padding=True))
        encoded_published = jax.jit(lambda model: model.encode(tokens, mask))(random_model(published))
        assert np.abs(encoded_published - encoded)[mask].max() > 1e-3


def test_bfloat16_activations() -> None:
    """Logits are float32, and near those of float32."""
    tokens, mask = (jnp.asarray(part) for part in sources())
    rows = jnp.asarray(draw_tokens(3, 6, seed=4))
    wide, narrow = (
        jax.jit(lambda model: model(tokens, rows, mask))(
            random_model(
                replace(
                    config("augmented", dtype=dtype, param_dtype="float32"),
                    encoder_attention=AttentionConfig("softmax"),
                )
            )
        )
        for dtype in ("float32", "bfloat16")
    )
    assert narrow.dtype == jnp.float32
    assert jnp.linalg.norm(narrow - wide) < 0.03 * jnp.linalg.norm(wide)


@pytest.mark.parametrize("kind", [T5, T5Classifier])
@pytest.mark.parametrize("name", some_of(ATTENTIONS, ("augmented",)))
def test_names(name: str, kind: Any) -> None:
    """Everything goes out under a name and comes back, bit for bit."""
    model = random_model(config(name, dtype="float32", param_dtype="float32", feed_forward="gated-gelu"), kind)
    table = entries(model)
    assert not uncovered(model, table)
    tensors = named(nnx.state(model), table)
    prefix = "transformer." if kind is T5Classifier else ""
    assert tensors[f"{prefix}decoder.block.1.layer.1.EncDecAttention.k.weight"].shape == (12, 16)
    if name == "augmented":
        assert tensors[f"{prefix}encoder.block.1.layer.0.SelfAttention.dwconv.weight"].shape == (2, 1, 5, 1)
    copy = nnx.eval_shape(lambda: kind(model.config, rngs=nnx.Rngs(0)))
    stray = {
        f"{prefix}encoder.embed_tokens.weight": tensors[f"{prefix}shared.weight"],
        f"{prefix}decoder.block.0.layer.1.EncDecAttention.dwconv.weight": np.zeros((2, 1, 5, 1)),
    }
    read_t5(copy, tensors | stray)
    for path, leaf in tensors.items():
        assert np.array_equal(named(nnx.state(copy), table)[path], leaf)
    with pytest.raises(UserError, match=r"embed_tokens\.weight is unknown$"):
        read_t5(copy, tensors | {f"{prefix}decoder.embed_tokens.weight": tensors[f"{prefix}shared.weight"] + 1})


@pytest.mark.parametrize("options", ARCHITECTURES.values(), ids=list(ARCHITECTURES))
def test_configurations(options: dict[str, Any]) -> None:
    """As it stands in a file, as transformers rewrites it, and out and in again."""
    given = SIZES | options
    found = config_from_huggingface(given)
    assert found.tie_embeddings is options.get("tie_word_embeddings", True)
    assert (found.hidden_size, found.head_dim, found.decoder_layers) == (16, 6, 3)
    assert found.encoder_attention == found.decoder_attention == found.cross_attention == AttentionConfig("softmax")
    rewritten = transformers.T5Config(**given).to_dict()
    assert config_from_huggingface(rewritten) == found
    out = config_to_huggingface(found)
    assert config_from_huggingface(out) == found
    assert config_from_huggingface(transformers.T5Config(**out).to_dict()) == found
    linear = config_from_huggingface(given, AttentionConfig("linformer"))
    assert (linear.encoder_attention.name, linear.cross_attention.name) == ("linformer", "softmax")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "model.dtype 'float16' is unknown"),
        ({"feed_forward": "gelu"}, "model.feed_forward 'gelu' is unknown"),
        ({"buckets": 7}, "model.buckets is 7"),
        ({"max_distance": 4}, "model.max_distance is 4"),
        ({"vocab_size": None}, "model.vocab_size is not set"),
        ({"cross_attention": AttentionConfig("linformer")}, "attention.name 'linformer' has no cross form"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        nnx.eval_shape(
            lambda: T5(
                config("augmented", **{"dtype": "float32", "param_dtype": "float32"} | options), rngs=nnx.Rngs(0)
            )
        )
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_configuration_without_sizes() -> None:
    with pytest.raises(UserError, match=r"^the configuration has no d_kv, num_heads; give"):
        config_from_huggingface({k: v for k, v in SIZES.items() if k not in ("d_kv", "num_heads")})
