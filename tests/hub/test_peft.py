"""LoRA adapters: what they do to a model, merging, and PEFT folders in both directions."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lin_jax.attention import AttentionConfig
from lin_jax.cli.hub.options import main
from lin_jax.errors import UserError
from lin_jax.hub import from_pretrained, save_pretrained
from lin_jax.hub.families.registry import family_of_model
from lin_jax.hub.peft import load_adapters, save_adapters
from lin_jax.hub.tensors import named
from lin_jax.models import Gpt2, Gpt2Config, Llama, LlamaConfig
from lin_jax.models.lora import adapters, add_lora, merge_lora

TOKENS = np.random.default_rng(0).integers(0, 29, (2, 11))
SOFTMAX = AttentionConfig("softmax")
SIZES: dict[str, Any] = {"vocab_size": 29, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "attention": SOFTMAX}
DOUBLE: dict[str, Any] = {"dtype": "float64", "param_dtype": "float64"}
pytestmark = [
    pytest.mark.usefixtures("x64"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT asks transformers so
]


def build(family: str) -> Any:
    if family == "llama":
        return Llama(LlamaConfig(**SIZES, **DOUBLE, intermediate_size=24, num_kv_heads=2), rngs=nnx.Rngs(0))
    return Gpt2(Gpt2Config(**SIZES, **DOUBLE, max_positions=32), rngs=nnx.Rngs(0))


def adapted(family: str, *targets: str) -> Any:
    """A model whose adapters do something; PEFT begins with them in single precision, so that is what they hold."""
    model = build(family)
    add_lora(model, 3, 6.0, **({"targets": targets} if targets else {}), rngs=nnx.Rngs(1))
    rng = np.random.default_rng(2)
    for adapter in adapters(model).values():
        for part in (adapter.update.lora_a, adapter.update.lora_b):
            part[...] = jnp.asarray(rng.normal(size=part.shape).astype(np.float32), jnp.float64)
    return model


@jax.jit
def logits(model: Any) -> jax.Array:
    return model(jnp.asarray(TOKENS))


@jax.jit
def slopes(model: Any) -> Any:
    """Gradients of the adapters alone."""
    wanted = nnx.DiffState(0, nnx.LoRAParam)
    return nnx.grad(lambda model: jnp.sum(jnp.square(model(jnp.asarray(TOKENS)))), argnums=wanted)(model)


def assert_merged_alike(model: Any, theirs: Any) -> None:
    """Merging leaves PEFT's weights, to 1e-9; logits are as near as transformers' float32 allows."""
    with torch.no_grad():
        found = theirs.eval()(torch.as_tensor(TOKENS)).logits.numpy()
    expected = logits(model)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    merge_lora(model)
    assert not adapters(model)
    np.testing.assert_allclose(logits(model), expected, rtol=1e-9, atol=1e-9)
    weights = theirs.merge_and_unload().state_dict()
    entries = family_of_model(model).entries(model)
    for name, tensor in named(nnx.state(model), entries).items():
        np.testing.assert_allclose(tensor, weights[name].numpy(), rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_in_pytorch_and_back(family: str, tmp_path: Path) -> None:
    """Adapters start as nothing, are merged exactly, and PEFT reads and writes the same."""
    plain = build(family)
    before = logits(plain)
    save_pretrained(plain, tmp_path / "base")
    add_lora(plain, 3, 6.0, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(logits(plain), before)

    model = adapted(family)
    expected = logits(model)
    assert np.abs(expected - before).max() > 0.1
    save_adapters(model, tmp_path / "adapters", base=str(tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapters").double()
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("adapters", "theirs"):
        back = from_pretrained(tmp_path / "base", **DOUBLE)
        load_adapters(back, tmp_path / folder)
        np.testing.assert_array_equal(logits(back), expected)
    assert_merged_alike(back, theirs)
    main(["import", str(tmp_path / "base"), str(tmp_path / "merged"), "--adapter", str(tmp_path / "theirs")])
    np.testing.assert_array_equal(logits(from_pretrained(tmp_path / "merged", **DOUBLE)), logits(back))


def test_adapters_of_some_layers_that_pytorch_made(tmp_path: Path) -> None:
    """Layers of a stack without an adapter go on as before."""
    save_pretrained(build("llama"), tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    options = {"target_modules": ["up_proj"], "layers_to_transform": [1], "init_lora_weights": False}
    theirs = get_peft_model(base, LoraConfig(r=2, lora_alpha=8, **options)).double()
    theirs.save_pretrained(tmp_path / "theirs")
    model = from_pretrained(tmp_path / "base", **DOUBLE)
    load_adapters(model, tmp_path / "theirs")
    assert_merged_alike(model, theirs)


def test_only_adapters_learn() -> None:
    gradients = slopes(adapted("llama", "query", "down"))
    paths = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(gradients)}
    assert len(paths) == 4
    assert all("update/lora_" in path for path in paths)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    model = adapted("llama")
    with pytest.raises(UserError, match="the rank of the adapters is 0"):
        add_lora(build("llama"), 0, 1.0, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="no linear layer is named 'q_proj'; choose among down, gate, head, key"):
        add_lora(build("llama"), 1, 1.0, targets=("q_proj",), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="the model has no adapters"):
        save_adapters(build("llama"), tmp_path / "none", base="")
    with pytest.raises(UserError, match="cannot be read as adapters"):
        load_adapters(build("llama"), tmp_path / "nowhere")
    save_adapters(model, tmp_path / "adapters", base="")
    with pytest.raises(UserError, match=r"the model has no layer, .* for model.layers.0.self_attn.k_proj"):
        load_adapters(build("gpt2"), tmp_path / "adapters")
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    (tmp_path / "adapters" / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(UserError, match="use_dora True is not supported"):
        load_adapters(build("llama"), tmp_path / "adapters")
