"""PyTorch source that is saved with linearized models, so that transformers opens them without this package.

With `trust_remote_code=True`, `AutoModelForCausalLM` reads it from the folder. It is copied as text: nothing here
imports PyTorch.
"""

import shutil
from pathlib import Path

from lin_jax.errors import UserError

SOURCE = Path(__file__).parent / "torch_source"
SHARED = (
    "attention_lin_jax.py",
    "cache_lin_jax.py",
    "causal_lm_lin_jax.py",
    "configuration_lin_jax.py",
    "linear_attention_lin_jax.py",
    "other_attention_lin_jax.py",
    "recurrence_lin_jax.py",
    "versions_lin_jax.py",
    "windowed_attention_lin_jax.py",
)
# By family: configuration, model and model with a head.
CLASSES = {
    "llama": ("LinJaxLlamaConfig", "LinJaxLlamaModel", "LinJaxLlamaForCausalLM"),
    "gpt2": ("LinJaxGPT2Config", "LinJaxGPT2Model", "LinJaxGPT2LMHeadModel"),
}


def write_remote_code(folder: Path, family: str) -> None:
    """Writes the source that opens a linearized model of a family into its folder.

    Raises:
        UserError: there is no such source for this family.
    """
    _classes(family)
    for name in (*SHARED, f"{_module(family)}.py"):
        shutil.copyfile(SOURCE / name, folder / name)


def auto_map(family: str) -> dict[str, str]:
    """The `auto_map` of a `config.json`: classes of the source by transformers' automatic classes.

    Raises:
        UserError: there is no such source for this family.
    """
    configuration, model, model_with_head = _classes(family)
    return {
        "AutoConfig": f"configuration_lin_jax.{configuration}",
        "AutoModel": f"{_module(family)}.{model}",
        "AutoModelForCausalLM": f"{_module(family)}.{model_with_head}",
    }


def architectures(family: str) -> list[str]:
    """The `architectures` of a `config.json`.

    Raises:
        UserError: there is no such source for this family.
    """
    return [_classes(family)[2]]


def _classes(family: str) -> tuple[str, str, str]:
    if family not in CLASSES:
        raise UserError(
            f"linearized models of the family '{family}' cannot be opened in PyTorch; {' and '.join(CLASSES)} can"
        )
    return CLASSES[family]


def _module(family: str) -> str:
    return f"modeling_lin_jax_{family}"
