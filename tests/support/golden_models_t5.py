"""The T5 models that golden files belong to."""

from dataclasses import replace
from typing import Any

import numpy as np
from flax import nnx
from support.golden_files import Golden

from lin_jax.attention import AttentionConfig
from lin_jax.hub.families.t5 import config_from_huggingface, read_t5
from lin_jax.models import T5, T5Classifier, T5Config

HEAD = "classification_head."


def attention(golden: Golden) -> AttentionConfig:
    """The replaced attention; of cross-attention it leaves the convolution away."""
    names = {
        (True, False): "flash_local",
        (False, True): "flash_global",
        (True, True): "flash_global+local" if golden.settings["alpha"] else "flash",
    }
    name = names[golden.settings["local"], golden.settings["global"]]
    return AttentionConfig(
        name + ("+convolution" if golden.settings["conv"] else ""),
        group_size=golden.config["group_size"],
        kernel_size=golden.config["kernel_size"] or 1,
        convolve_padding=True,
    )


def configuration(golden: Golden, dtype: str) -> T5Config:
    """Sizes, and the attention of each of the three kinds that the settings replace."""
    replaced: dict[str, Any] = {
        f"{part}_attention": attention(golden)
        for part in ("encoder", "decoder", "cross")
        if golden.settings[part] and not golden.settings["softmax"]
    }
    return replace(config_from_huggingface(golden.config), **replaced, dtype=dtype, param_dtype=dtype)


def trunk(golden: Golden) -> dict[str, np.ndarray]:
    """The weights below the classification head, without those of attentions that are not replaced."""
    kept = {"encoder": ".SelfAttention.", "decoder": ".SelfAttention.", "cross": ".EncDecAttention."}
    unused = [
        ("decoder" if part == "cross" else part, kind) for part, kind in kept.items() if not golden.settings[part]
    ]
    return {
        name: value
        for name, value in golden.weights.items()
        if not name.startswith(HEAD)
        and not (
            name.endswith((".alpha", ".dwconv.weight"))
            and any(name.startswith(stack) and kind in name for stack, kind in unused)
        )
    }


def t5(golden: Golden, dtype: str) -> T5:
    """The model with the file's weights, in the given type."""
    model = nnx.eval_shape(lambda: T5(configuration(golden, dtype), rngs=nnx.Rngs(0)))
    read_t5(model, trunk(golden))
    return model


def t5_classifier(golden: Golden, dtype: str) -> T5Classifier:
    """The classifier on the same trunk."""
    model = nnx.eval_shape(lambda: T5Classifier(configuration(golden, dtype), rngs=nnx.Rngs(0)))
    named = {f"transformer.{name}": value for name, value in trunk(golden).items() if name != "lm_head.weight"}
    read_t5(model, named | {name: value for name, value in golden.weights.items() if name.startswith(HEAD)})
    return model
