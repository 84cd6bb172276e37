"""Models that are exported and opened by transformers in PyTorch, of every attention."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import AutoModelForCausalLM, PreTrainedModel, dynamic_module_utils

from lin_jax.attention import AttentionConfig, has_growing_state
from lin_jax.models import Gpt2, Gpt2Config, Llama, LlamaConfig

GROUP = 4
SIZES = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 4}
SMALL = {"group_size": GROUP, "kernel_size": 5, "features": 6, "rank": 2, "hashes": 3, "hash_bits": 2}


@dataclass(frozen=True)
class Case:
    """A model to export."""

    attention: str
    family: str = "llama"
    options: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        chosen = [f"{name}={value}" for name, value in self.sizes.items() if name not in ("pattern", "layers")]
        mixed = [name for name in ("pattern", "layers") if name in self.sizes]
        return "-".join([self.family, self.attention, *self.options, *chosen, *mixed])

    @property
    def has_growing_state(self) -> bool:
        return has_growing_state(AttentionConfig(self.attention, **self.sizes))

    def model(self, dtype: str = "float64") -> Any:
        attention = AttentionConfig(self.attention, **SMALL | self.sizes)
        common = {**SIZES, "attention": attention, "dtype": dtype, "param_dtype": dtype, **self.options}
        if self.family == "gpt2":
            return random_model(lambda: Gpt2(Gpt2Config(**common, max_positions=80), rngs=nnx.Rngs(0)))
        return random_model(lambda: Llama(LlamaConfig(**{"num_kv_heads": 2, **common}), rngs=nnx.Rngs(0)))


# A window before a memory, and a window alone.
BESIDE_SINKS = ("hedgehog+window", {"name": "softmax", "window": 3, "sinks": 2})
CASES = [
    Case("augmented", options={"tie_embeddings": True}),
    Case("flash_local", "gpt2", sizes={"local_score": "laplace"}),
    Case("augmented", "gpt2"),
    Case("linformer+local+convolution", "gpt2"),
    Case("transnormer"),
    Case("yoso+local+convolution"),
    Case("rfa", options={"num_kv_heads": 1, "head_dim": 6}),
    Case("linear_angular+convolution", options={"attention_bias": True}),
    Case("softmax", "gpt2", sizes={"window": 5}),
    Case("augmented", sizes={"pattern": ("augmented", {"name": "softmax", "window": 3})}),
    Case("exponential+window+convolution", "gpt2", sizes={"window": 5}),
    Case("hedgehog+window", sizes={"window": 6, "decay": "token"}),
    Case("hedgehog+window", sizes={"window": 6, "decay": "token", "sinks": 3, "pattern": BESIDE_SINKS}),
    Case("clustered+window", sizes={"window": 6, "rotary_memory": False, "sinks": 2}),
]
THOROUGH = [
    Case("flash_global"),
    Case("flash+convolution", "gpt2", {"tie_embeddings": False}, {"local_score": "yoso"}),
    Case("linformer"),
    Case("performer", "gpt2"),
    Case("performer+local+convolution", options={"query_key_norm": True, "num_kv_heads": 4}),
    Case("yoso", "gpt2"),
    Case("relu+local", "gpt2"),
    Case("square+convolution", "gpt2"),
    Case("softmax+local"),
    Case("augmented", "gpt2", sizes={"layers": {1: "softmax"}}),
    Case("exponential+window"),
    Case("elu+local", "gpt2", sizes={"decay": "constant"}),
    Case("hedgehog"),
    Case("clustered+window", sizes={"window": 5, "features": 6}),
    Case("exponential", "gpt2"),
    Case("elu"),
    Case("exponential+window", "gpt2", sizes={"window": 1}),
    Case("performer+window", sizes={"window_groups": 2, "decay": "constant"}),
    Case("relu+window", "gpt2", sizes={"window_groups": 0, "decay": "token"}),
    Case("exponential+window", "gpt2", sizes={"window_groups": 0, "decay": "constant", "sinks": 5}),
    Case("augmented", sizes={"decay": "token"}),
    Case("flash_global", "gpt2", sizes={"decay": "constant"}),
    Case("flash+convolution", sizes={"decay": "constant"}),
    Case("rfa", "gpt2", sizes={"decay": "token"}),
    Case("performer+local", options={"num_kv_heads": 1}, sizes={"decay": "constant"}),
]
FLAGSHIP = CASES[0]
AUGMENTED = Case("linformer+local+convolution")  # has all that a state can have


def random_model(build: Callable[[], Any]) -> Any:
    """Every parameter and projection random, also those that begin as constants."""
    model, rng = nnx.eval_shape(build), np.random.default_rng(1)
    state = nnx.state(model)
    for path, leaf in nnx.to_flat_state(state):
        value = np.arange(*leaf.shape) if path[-1] == "layer" else rng.normal(size=leaf.shape) * 0.4
        leaf.set_value(jnp.asarray(value, leaf.dtype))
    nnx.update(model, state)
    return model


@pytest.fixture(scope="module", autouse=True)
def code_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The code of opened folders is kept here, not at home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(sys, "path", [*sys.path])
        yield
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are tiny here, and threads that wait for each other are slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def opened(folder: Path, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
