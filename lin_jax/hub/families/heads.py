"""One rule for heads in all families: tied by the configuration, by the files, or missing."""

from collections.abc import Container, Mapping, Sequence
from typing import Any

from lin_jax.hub.families.registry import Family
from lin_jax.hub.tensors import Mismatch

SETTING = "tie_word_embeddings"


def has_own_head(family: Family, config: Any, tensors: Mapping[str, Any]) -> bool:
    """True if files hold a head beside the embedding that a configuration ties it to, and the model can have it.

    Args:
        family: the model's.
        config: the model's configuration.
        tensors: the checkpoint's tensors for the model, without copies.
    """
    return family.unties and config.tie_embeddings and family.head_name in tensors


def with_shared_head(
    family: Family, hf_config: Mapping[str, Any], names: Container[str], tensors: Mapping[str, Any]
) -> dict[str, Any]:
    """The tensors, with the embedding as the head that files leave out since they tie it, though it reads unscaled.

    So transformers 5 writes a T5 1.1.

    Args:
        family: the model's.
        hf_config: contents of `config.json`.
        names: of the tensors that the model has.
        tensors: the checkpoint's tensors for the model.
    """
    shared = family.head_name in names and family.head_name not in tensors and hf_config.get(SETTING) is True
    if not shared or family.embedding_name not in tensors:
        return dict(tensors)
    return {**tensors, family.head_name: tensors[family.embedding_name]}


def head_remedy(family: Family, hf_config: Mapping[str, Any], problems: Sequence[Mismatch]) -> str:
    """Says how to mend a head that is missing or unknown; empty if none is."""
    kinds = {each.kind for each in problems if each.name == family.head_name}
    said = f'"{SETTING}": {str(hf_config[SETTING]).lower()}' if SETTING in hf_config else f"no {SETTING}"
    if "is missing" in kinds:
        named = hf_config.get("architectures") or []
        base = next((f"; a {name} is saved without a head" for name in named if name in family.bases), "")
        return (
            f'config.json has {said}, by which the head is a matrix of its own{base}; set "{SETTING}": true there '
            f"if the head is the embedding, else give a checkpoint with {family.head_name}"
        )
    if "is unknown" in kinds:
        return (
            f"config.json has {said}, by which the head is the embedding, and {family.head_name} is another matrix; "
            f'set "{SETTING}": false there if the family has such models, else remove the tensor'
        )
    return ""
