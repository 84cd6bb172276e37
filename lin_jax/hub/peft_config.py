"""Options of PEFT's `adapter_config.json`: what each layer's update is, and what is refused since it is another sum."""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lin_jax.errors import UserError
from lin_jax.hub.families.config_fields import ConfigFields
from lin_jax.json_files import read_json, short

log = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
# PEFT's defaults where the file has no such option.
RANK, ALPHA = 8, 8
# Initial values that leave the base as it was.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
# Options by which an adapter is another sum than `alpha / r A B`, with the value that turns each of them off.
_UNSUPPORTED: dict[str, Any] = {
    "use_dora": False,
    "use_qalora": False,
    "use_bdlora": False,
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": [],
    "trainable_token_indices": [],
    "target_parameters": [],
    "layer_replication": [],
    "alora_invocation_tokens": [],
    "arrow_config": {},
    "kasa_config": {},
    "monteclora_config": {},
    "velora_config": {},
}
# Options that say how an adapter was trained, or where.
_WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
)
_READ = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


@dataclass(frozen=True)
class PeftConfig:
    """Ranks and factors of a PEFT folder's updates.

    Attributes:
        r: the rank, if no pattern matches.
        alpha: numerator of the factor, if no pattern matches.
        ranks: rank by pattern of layers' names.
        alphas: numerator by pattern of layers' names.
        root: divide the factor by the root of the rank, not by the rank (Kalajdzievski 2023).
    """

    r: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    root: bool = False

    def rank(self, layer: str) -> int:
        """Rank of a layer's update."""
        return _matching(self.ranks, layer, self.r)

    def factor(self, layer: str) -> float:
        """Factor of a layer's update."""
        rank = self.rank(layer)
        return _matching(self.alphas, layer, self.alpha) / (math.sqrt(rank) if self.root else rank)


def read_adapter_config(folder: Path) -> PeftConfig:
    """Reads a PEFT folder's options.

    Raises:
        UserError: the folder holds none, or adapters of a kind that is not supported.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} cannot be read as adapters: it holds no {CONFIG}; give a PEFT folder")
    content = read_json(folder / CONFIG)
    if content.get("peft_type") != "LORA":
        raise UserError(f'{folder}: peft_type {short(content.get("peft_type"))} is not supported; give "LORA" adapters')
    for option, plain in _UNSUPPORTED.items():
        if content.get(option) not in (None, plain, {}, []):
            raise UserError(f"{folder}: {option} {short(content[option])} is not supported; give plain LoRA")
    _check_start(folder, content.get("init_lora_weights"))
    if left := sorted(set(content) - set(_UNSUPPORTED) - {*_WITHOUT_EFFECT, *_READ}):
        log.warning("%s: options %s are unknown here and not heeded", folder / CONFIG, ", ".join(left)[:200])
    for name in ("r", "lora_alpha"):
        if name in content and content[name] is None:
            raise UserError(f"{folder}: {name} is null; give the number that the adapters were trained with")
    given = ConfigFields(content, "LoRA")
    ranks, alphas = (ConfigFields(given.part(f"{name}_pattern"), "LoRA") for name in ("rank", "alpha"))
    return PeftConfig(
        given.size("r", RANK),
        given.number("lora_alpha", ALPHA),
        {pattern: ranks.size(pattern) for pattern in _patterns(folder, ranks)},
        {pattern: alphas.number(pattern, ALPHA) for pattern in _patterns(folder, alphas)},
        given.flag("use_rslora", False),
    )


def _check_start(folder: Path, start: Any) -> None:
    if start is None or any(type(start) is type(plain) and start == plain for plain in _PLAIN_STARTS):
        return
    raise UserError(
        f"{folder}: init_lora_weights {short(start)} changed the base that the adapters stand on; convert them with "
        "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
    )


def _patterns(folder: Path, given: ConfigFields) -> list[str]:
    for pattern in given.content:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{folder}: the pattern {short(pattern)} is none ({error}); correct it") from None
    return list(given.content)


def _matching(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """The value of the first pattern for a layer, as PEFT finds it: the whole end of the name, after a dot."""
    return next((value for each, value in patterns.items() if re.match(rf"(.*\.)?({each})$", layer)), default)
