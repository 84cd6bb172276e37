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
from safetensors.numpy import load_file, save_file
from support.cells import some_of
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


@pytest.mark.parametrize("family", some_of(["llama", "gpt2"], 1))
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


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"layers.0.mlp.up_proj": 3}, "alpha_pattern": {"up_proj": 5, "1.mlp.down_proj": 3}},
        {"use_rslora": True, "rank_pattern": {r"model.layers.\d.mlp.up_proj": 3}, "init_lora_weights": "gaussian"},
    ],
)
def test_ranks_and_factors_of_pytorch(options: dict[str, Any], tmp_path: Path) -> None:
    """Of each layer by itself, under patterns and by the root of the rank."""
    save_pretrained(build("llama"), tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    settings = LoraConfig(r=2, lora_alpha=8, target_modules=["up_proj", "down_proj"], **options)
    theirs = get_peft_model(base, settings).double()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, generator=torch.Generator().manual_seed(0))
    theirs.save_pretrained(tmp_path / "theirs")
    model = from_pretrained(tmp_path / "base", **DOUBLE)
    load_adapters(model, tmp_path / "theirs")
    assert_merged_alike(model, theirs)


PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
PAIR = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


def folder_of(folder: Path, config: Any, rename: str = "{}.weight", dtype: Any = np.float32) -> Path:
    """Adapters as others write them: of one layer, with names after a pattern."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8-sig")
    shapes = {"A": (2, 16), "B": (16, 2)}
    rng = np.random.default_rng(0)
    save_file(
        {rename.format(PAIR + letter): rng.normal(size=shape).astype(dtype) for letter, shape in shapes.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


def change_by(folder: Path) -> np.ndarray:
    """The update of the first layer's queries."""
    model = build("llama")
    before = np.array(model.layers.layers.attention.query.kernel[...])
    load_adapters(model, folder)
    merge_lora(model)
    changed = np.asarray(model.layers.layers.attention.query.kernel[...]) - before
    assert not changed[1].any()
    return changed[0].T


def test_adapters_of_others_are_read(tmp_path: Path) -> None:
    """Under an adapter's name or a wrapper's, in half precision, with PEFT's defaults."""
    folder = folder_of(tmp_path / "plain", PLAIN)
    pair = load_file(folder / "adapter_model.safetensors")
    right = 2 * pair[f"{PAIR}B.weight"].astype(float) @ pair[f"{PAIR}A.weight"].astype(float)
    np.testing.assert_allclose(change_by(folder), right, rtol=1e-9, atol=1e-12)
    for number, name in enumerate(["{}.default.weight", "module.{}.weight", "_orig_mod.{}.weight"]):
        np.testing.assert_array_equal(change_by(folder_of(tmp_path / str(number), PLAIN, name)), change_by(folder))
    half = change_by(folder_of(tmp_path / "half", PLAIN, dtype=jnp.bfloat16))
    np.testing.assert_allclose(half, right, rtol=0, atol=0.02 * np.abs(right).max())
    alone = {"peft_type": "LORA", "r": 2, "init_lora_weights": True, "fan_in_fan_out": True, "bias": None}
    np.testing.assert_allclose(change_by(folder_of(tmp_path / "alone", alone)), right * 2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({"init_lora_weights": start}, "changed the base that the adapters stand on; convert them with PEFT's")
            for start in ("pissa", "pissa_niter_16", "olora", "loftq", "corda", "lora_ga", "mica", 1, ["pissa"])
        ),
        ({"use_qalora": True}, "use_qalora true is not supported"),
        ({"lora_bias": True}, "lora_bias true is not supported"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices [1, 2] is not supported"),
        ({"layer_replication": [[0, 1]]}, "layer_replication [[0, 1]] is not supported"),
        ({"r": None}, "r is null; give the number"),
        ({"r": "2"}, 'r is "2" in the configuration; give a whole number'),
        ({"r": 0}, "r is 0 in the configuration; give a whole number"),
        ({"lora_alpha": None}, "lora_alpha is null; give the number"),
        ({"lora_alpha": "4"}, 'lora_alpha is "4"'),
        ({"rank_pattern": {"(": 2}}, 'the pattern "(" is none'),
        ({"rank_pattern": [2]}, "rank_pattern is [2]"),
        ({"peft_type": ["LORA"]}, 'peft_type ["LORA"] is not supported'),
        ({"r": 3}, "lora_A of model.layers.0.self_attn.q_proj has shape (2, 16), the model expects (3, 16)"),
        (None, "does not hold a JSON object"),
    ],
)
def test_adapters_of_others_are_refused(change: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "adapters", [] if change is None else PLAIN | change)
    with pytest.raises(UserError) as caught:
        load_adapters(build("llama"), folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_adapters_that_are_no_numbers_or_a_pickle(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "adapters", PLAIN)
    pair = load_file(folder / "adapter_model.safetensors")
    save_file({name: np.full_like(part, np.nan) for name, part in pair.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="holds NaN or infinity"):
        load_adapters(build("llama"), folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="a pickle, which can run code"):
        load_adapters(build("llama"), folder)


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
    with pytest.raises(UserError, match="use_dora true is not supported"):
        load_adapters(build("llama"), tmp_path / "adapters")
