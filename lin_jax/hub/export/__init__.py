"""PyTorch source that is saved with linearized models, so that transformers opens them without this package.

With `trust_remote_code=True`, transformers' automatic classes read it from the folder. It is copied as text: nothing
here imports PyTorch.
"""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lin_jax.errors import UserError

SOURCE = Path(__file__).parent / "torch_source"
# What the code of every family needs.
MIXERS = (
    "attention_lin_jax.py",
    "configuration_lin_jax.py",
    "int8_lin_jax.py",
    "linear_attention_lin_jax.py",
    "other_attention_lin_jax.py",
    "pretrained_lin_jax.py",
    "recurrence_lin_jax.py",
    "versions_lin_jax.py",
    "windowed_attention_lin_jax.py",
)
CAUSAL = (*MIXERS, "cache_lin_jax.py", "causal_lm_lin_jax.py", "drafts_lin_jax.py", "speculation_lin_jax.py")
# Source of the function that transformers puts in the place of the model's `generate`, and its file in a folder.
GENERATE = ("generate_lin_jax.py", "custom_generate/generate.py")
# Attentions that the source has; one that was registered elsewhere opens in JAX alone.
ATTENTIONS = (
    "softmax",
    "flash_local",
    "flash_global",
    "flash",
    "linformer",
    "performer",
    "transnormer",
    "yoso",
    "relu",
    "elu",
    "hedgehog",
    "exponential",
    "clustered",
    "rfa",
    "linear_angular",
    "square",
)


@dataclass(frozen=True)
class RemoteCode:
    """The PyTorch source of a family.

    Attributes:
        config: class of its configuration.
        base: class of its model without a head.
        heads: by the name of a model here, the automatic class of transformers that opens it, and its own class; the
            first is the family's own.
        shared: files beside that of the family.
    """

    config: str
    base: str
    heads: Mapping[str, tuple[str, str]]
    shared: tuple[str, ...] = CAUSAL

    @property
    def writes_texts(self) -> bool:
        """True if its models have a `generate`."""
        return {*CAUSAL} <= {*self.shared}


CLASSES = {
    "llama": RemoteCode(
        "LinJaxLlamaConfig",
        "LinJaxLlamaModel",
        {"Llama": ("AutoModelForCausalLM", "LinJaxLlamaForCausalLM")},
        (*CAUSAL, "norms_lin_jax.py"),
    ),
    "gpt2": RemoteCode(
        "LinJaxGPT2Config", "LinJaxGPT2Model", {"Gpt2": ("AutoModelForCausalLM", "LinJaxGPT2LMHeadModel")}
    ),
    "bert": RemoteCode(
        "LinJaxBertConfig",
        "LinJaxBertModel",
        {
            "BertMaskedLM": ("AutoModelForMaskedLM", "LinJaxBertForMaskedLM"),
            "BertClassifier": ("AutoModelForSequenceClassification", "LinJaxBertForSequenceClassification"),
            "Bert": ("AutoModel", "LinJaxBertModel"),
        },
        (*MIXERS, "both_sides_lin_jax.py"),
    ),
    "flash": RemoteCode(
        "LinJaxFlashConfig",
        "LinJaxFlashForCausalLM",
        {"Flash": ("AutoModelForCausalLM", "LinJaxFlashForCausalLM")},
        (*CAUSAL, "relative_bias_lin_jax.py"),
    ),
    "t5": RemoteCode(
        "LinJaxT5Config",
        "LinJaxT5Model",
        {
            "T5": ("AutoModelForSeq2SeqLM", "LinJaxT5ForConditionalGeneration"),
            "T5Classifier": ("AutoModelForSequenceClassification", "LinJaxT5ForSequenceClassification"),
        },
        (
            *CAUSAL,
            "both_sides_lin_jax.py",
            "cross_attention_lin_jax.py",
            "norms_lin_jax.py",
            "relative_bias_lin_jax.py",
            "t5_layers_lin_jax.py",
        ),
    ),
}


def has_source(family: str, model: str, attentions: Iterable[str]) -> bool:
    """True if there is source that opens linearized models of a family.

    Args:
        family: the model's.
        model: name of its class here.
        attentions: names of its attentions, without what is added to them.
    """
    code = CLASSES.get(family)
    return code is not None and model in code.heads and {*attentions} <= {*ATTENTIONS}


def write_remote_code(folder: Path, family: str) -> None:
    """Writes the source that opens a linearized model of a family into its folder.

    Raises:
        UserError: there is no such source for this family.
    """
    code = _code(family)
    for name in (*code.shared, f"{_module(family)}.py"):
        shutil.copyfile(SOURCE / name, folder / name)
    if code.writes_texts:
        source, file = GENERATE
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(SOURCE / source, folder / file)


def auto_map(family: str, model: str | None = None) -> dict[str, str]:
    """The `auto_map` of a `config.json`: classes of the source by transformers' automatic classes.

    Args:
        family: the model's.
        model: name of its class here; None is the family's first.

    Raises:
        UserError: there is no such source for this family.
    """
    code, module = _code(family), _module(family)
    automatic, head = _head(code, model)
    return {
        "AutoConfig": f"configuration_lin_jax.{code.config}",
        "AutoModel": f"{module}.{code.base}",
        automatic: f"{module}.{head}",
    }


def architectures(family: str, model: str | None = None) -> list[str]:
    """The `architectures` of a `config.json`; arguments as in `auto_map`.

    Raises:
        UserError: there is no such source for this family.
    """
    return [_head(_code(family), model)[1]]


def _head(code: RemoteCode, model: str | None) -> tuple[str, str]:
    return code.heads[next(iter(code.heads)) if model is None else model]


def _code(family: str) -> RemoteCode:
    if family not in CLASSES:
        *others, last = CLASSES
        raise UserError(
            f"linearized models of the family '{family}' cannot be opened in PyTorch; "
            f"{', '.join(others)} and {last} can"
        )
    return CLASSES[family]


def _module(family: str) -> str:
    return f"modeling_lin_jax_{family}"
