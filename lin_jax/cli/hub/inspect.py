"""A checkpoint as a table: family, sizes, attention, tensors, state, and what does not fit."""

from lin_jax.attention import AttentionConfig
from lin_jax.hub.config_json import attentions_of
from lin_jax.hub.load import Pretrained
from lin_jax.hub.sizes import context_length, parameter_count, state_bytes
from lin_jax.hub.tensors import summary

# Tensors that do not fit, named one by one; a wholly different model has hundreds.
_NAMED = 20
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def table(opened: Pretrained) -> str:
    """Formats the table; nothing of the checkpoint but its headers is read."""
    rows = [("checkpoint", str(opened.folder)), *_model_rows(opened), *_tensor_rows(opened), *_problem_rows(opened)]
    rows += [("note", each) for each in opened.notes]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)


def _model_rows(opened: Pretrained) -> list[tuple[str, str]]:
    model, config = opened.model, opened.model.config
    length = context_length(config) or 2048
    rows = [
        ("family", f"{opened.family.name} ({opened.hf_config['model_type']}), {type(model).__name__}"),
        ("parameters", f"{parameter_count(model):,}"),
        ("layers", str(config.num_layers)),
        ("width", str(config.hidden_size)),
    ]
    heads = getattr(config, "num_heads", None)
    if heads is not None:
        shared = getattr(config, "num_kv_heads", None)
        rows.append(("heads", f"{heads}" + (f" ({shared} for keys and values)" if shared not in (None, heads) else "")))
    rows += [("vocabulary", str(config.vocab_size)), ("longest text", f"{length:,} tokens")]
    for place, attention in attentions_of(config).items():
        rows.append((f"attention {place}".rstrip(), _changes(attention)))
    state = state_bytes(model, length)
    if state is not None:
        rows.append(("decode state", f"{_size(state)} per sequence of {length:,} tokens"))
    return rows


def _changes(attention: AttentionConfig) -> str:
    """The name, and the fields that are not the default."""
    plain = AttentionConfig()
    names = [name for name in vars(plain) if name != "name" and getattr(attention, name) != getattr(plain, name)]
    return ", ".join([attention.name, *(f"{name} {getattr(attention, name)}" for name in names)])


def _tensor_rows(opened: Pretrained) -> list[tuple[str, str]]:
    counts: dict[str, list[int]] = {}
    for tensor in opened.tensors.values():
        count = counts.setdefault(tensor.dtype.name, [0, 0])
        count[0] += 1
        count[1] += tensor.nbytes
    rows = [(f"tensors {kind}", f"{count:,}, {_size(size)}") for kind, (count, size) in sorted(counts.items())]
    if opened.adds:
        rows.append(("begins anew", ", ".join(sorted("/".join(map(str, path)) for path in opened.adds))))
    return rows


def _problem_rows(opened: Pretrained) -> list[tuple[str, str]]:
    problems = opened.problems()
    if not problems:
        return [("fits", "every tensor")]
    rows = [("does not fit" if number == 0 else "", str(each)) for number, each in enumerate(problems[:_NAMED])]
    rows += [("in short", f"{summary(problems)}")] if len(problems) > _NAMED else []
    remedy = opened.remedy(problems)
    return rows + ([("what to do", remedy)] if remedy else [])


def _size(count: float) -> str:
    for unit in _UNITS:
        if count < 1024 or unit == _UNITS[-1]:
            break
        count /= 1024
    return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
