"""Golden files: numbers computed in float64 with the published PyTorch code, and the models they belong to."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open

from lin_jax.attention import AttentionConfig
from lin_jax.hub.families.llama import config_from_huggingface, read_llama
from lin_jax.hub.medusa import read_heads
from lin_jax.models import Llama, MedusaHeads


@dataclass(frozen=True)
class Golden:
    """One file: its metadata, and its arrays by prefix and name."""

    name: str
    config: dict[str, Any]
    settings: dict[str, Any]
    weights: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    grads: dict[str, np.ndarray]

    @classmethod
    def read(cls, path: Path) -> "Golden":
        with safe_open(path, "np") as file:
            metadata = file.metadata()
            arrays: dict[str, dict[str, np.ndarray]] = {"weights": {}, "inputs": {}, "outputs": {}, "grads": {}}
            for key in file.keys():  # noqa: SIM118 - a safe_open handle is no mapping
                prefix, name = key.split("/", 1)
                arrays[prefix][name] = file.get_tensor(key)
        return cls(path.stem, json.loads(metadata["config"]), json.loads(metadata["settings"]), **arrays)

    @property
    def attention(self) -> AttentionConfig:
        """The token mixer that the settings describe."""
        on = {key for key in ("local", "global", "conv") if self.settings.get(key)}
        names = {
            frozenset({"local"}): "flash_local",
            frozenset({"global"}): "flash_global",
            frozenset({"local", "global"}): "flash_global+local" if self.settings.get("global_factor") else "flash",
            frozenset({"local", "conv"}): "flash_local+convolution",
            frozenset({"global", "conv"}): "flash_global+convolution",
            frozenset({"local", "global", "conv"}): "augmented"
            if self.settings.get("global_factor")
            else "flash+convolution",
        }
        if self.settings.get("softmax"):
            return AttentionConfig(name="softmax")
        name = names[frozenset(on)]
        if self.settings.get("castling"):
            name = "linear_angular" + ("+convolution" if "conv" in on else "")
        return AttentionConfig(
            name=name,
            group_size=self.config["group_size"],
            kernel_size=self.config.get("kernel_size") or 1,
            local_score="yoso" if self.settings.get("yoso") else "relu_squared",
        )

    def llama(self, dtype: str) -> Llama:
        """The model with the file's weights, in the given type."""
        config = replace(config_from_huggingface(self.config, self.attention), dtype=dtype, param_dtype=dtype)
        model = Llama(config, rngs=nnx.Rngs(0))
        weights = {name.removeprefix("base_model."): value for name, value in self.weights.items()}
        read_llama(model, {name: value for name, value in weights.items() if not name.startswith("medusa_head")})
        return model

    def heads(self, dtype: str) -> MedusaHeads:
        """The file's Medusa heads."""
        sizes = (self.config["medusa_num_heads"], self.config["hidden_size"], self.config["vocab_size"])
        heads = MedusaHeads(*sizes, dtype=jnp.dtype(dtype))
        prefix = "medusa_head."
        read_heads(heads, {k.removeprefix(prefix): v for k, v in self.weights.items() if k.startswith(prefix)})
        return heads

    @property
    def family(self) -> str:
        """The architecture that the file's name begins with."""
        return self.name.split("-")[0]


def assert_close(actual: Any, expected: np.ndarray, dtype: str) -> None:
    """Within 1e-9 in float64; in float32 within 1e-4 of the largest expected value."""
    actual = np.asarray(actual)
    if dtype == "float64":
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)
    else:
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
