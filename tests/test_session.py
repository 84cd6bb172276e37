"""Sessions: a tokenizer with more entries than its model's embedding, and types of weights and of computation."""

import logging

import jax.numpy as jnp
import pytest
from flax import nnx

import lin_jax
from lin_jax.data import Tokenizer
from lin_jax.errors import UserError
from lin_jax.hub import save_pretrained
from lin_jax.models import Llama, LlamaConfig
from lin_jax.session import SAME_BITS_CHUNK, Session


def test_a_tokenizer_with_one_entry_more(caplog: pytest.LogCaptureFixture) -> None:
    """Prompts go in as long as none holds the token beyond."""
    tokenizer = Tokenizer.train(["some text"], 300)
    size = tokenizer.vocab_size
    tokenizer.backend.add_special_tokens(["<pad>"])
    assert tokenizer.vocab_size == size + 1
    config = LlamaConfig(vocab_size=size, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2)
    with caplog.at_level(logging.WARNING):
        session = Session.of(Llama(config, rngs=nnx.Rngs(0)), tokenizer)
    assert session.encode_prompt("some", begins=False) == tokenizer.encode("some").tolist()
    with pytest.raises(UserError, match=rf"the token '<pad>' of id {size}, and the model knows {size}; take it out"):
        session.encode_prompt("some <pad>")


def test_a_folder_is_opened_as_asked_for(tmp_path):
    tokenizer = Tokenizer.train(["some text of some words"], 264)
    config = LlamaConfig(
        vocab_size=264, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, param_dtype="bfloat16"
    )
    folder = save_pretrained(Llama(config, rngs=nnx.Rngs(0)), tmp_path / "llama", tokenizer=tokenizer)
    plain = Session.load(folder)
    assert (plain.model.config.dtype, plain.model.config.param_dtype) == ("float32", "bfloat16")
    assert Session.load(folder, dtype="bfloat16").model.config.dtype == "bfloat16"
    rounded = Session.load(folder, weights="int8")
    assert rounded.model.head.matrix.weight.dtype == jnp.int8
    model, tokenizer = lin_jax.from_pretrained(folder, weights="int8")
    text = lin_jax.generate(model, tokenizer, "some", 8, drafter="none")
    own = Session.of(model, tokenizer, weights="int8")
    found = own.generator("none", None).generate([own.encode_prompt("some")], 8).tokens[0]
    assert model.head.kernel.dtype == jnp.bfloat16
    assert text == [own.decode(found, after=own.encode_prompt("some"))]
    same = Session.load(folder, same_bits=True)
    assert same.model.same_bits
    assert same.generator("none", None).prefill_chunk_size == SAME_BITS_CHUNK
    assert not plain.model.same_bits
