"""Sessions: a tokenizer with more entries than its model's embedding."""

import logging

import pytest
from flax import nnx

from lin_jax.data import Tokenizer
from lin_jax.errors import UserError
from lin_jax.models import Llama, LlamaConfig
from lin_jax.session import Session


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
