"""Modules and their parameters as plain trees: dictionaries of names down to arrays."""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from lin_jax.errors import UserError
from lin_jax.models import MedusaHeads, ModelConfig, PathHead, model_class
from lin_jax.models.by_kind import layers_of_kinds, numbered
from lin_jax.models.mixed_stack import KIND
from lin_jax.models.registry import CAUSAL_LM

Params = dict[str, Any]
Path = tuple[str, ...]
Order = tuple[int, ...] | None
Module = TypeVar("Module", bound=nnx.Module)

# Differences named in one message; a wholly different model has hundreds.
_NAMED = 6
# Numbers of an array whose bits the host sums in no time.
_SMALL = 2**22


def new_params(config: ModelConfig, key: Array, wanted: set[Any] | None = None, purpose: str = CAUSAL_LM) -> Params:
    """Initial parameters of a model for a `purpose` of the registry of models.

    Args:
        config: the model's.
        key: a random key.
        wanted: paths; what is not wanted is not computed either. None wants all.
        purpose: of the model, such as `causal_lm`.
    """

    def draw(key: Array) -> Params:
        params = params_of(model_class(config, purpose)(config, rngs=nnx.Rngs(key)))
        if wanted is None:
            return params
        return unflatten_dict({path: value for path, value in flatten_dict(params).items() if path in wanted})

    return jax.jit(draw)(key)


def abstract_model(config: ModelConfig, purpose: str = CAUSAL_LM) -> Any:
    """A model of shapes, without memory or work behind it, for a `purpose` of the registry of models.

    Raises:
        UserError: the configuration describes no model, or its family has none for the purpose.
    """
    build = model_class(config, purpose)
    return nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))


def abstract_heads(config: ModelConfig, heads: int) -> MedusaHeads:
    """Medusa heads of shapes, for a model with the given configuration."""
    assert config.vocab_size is not None, "filled in when a run begins"
    size, vocabulary, dtype = config.hidden_size, config.vocab_size, jnp.dtype(config.param_dtype)
    return nnx.eval_shape(lambda: MedusaHeads(heads, size, vocabulary, dtype=dtype))


def abstract_path_head(
    config: ModelConfig, width: int, layers: Sequence[int] = (), guessed: int | None = None
) -> PathHead:
    """A path head of shapes, for a model with the given configuration; arguments as in `PathHead`.

    Raises:
        UserError: the head would be wider than the model.
    """
    assert config.vocab_size is not None, "filled in when a run begins"
    size, vocabulary, dtype = config.hidden_size, config.vocab_size, jnp.dtype(config.param_dtype)
    return nnx.eval_shape(
        lambda: PathHead(size, width, vocabulary, layers=layers, guessed=guessed, dtype=dtype, rngs=nnx.Rngs(0))
    )


def params_of(module: nnx.Module) -> Params:
    """A module's parameters (arrays or shapes) as a plain tree."""
    return nnx.to_pure_dict(nnx.state(module))


def filled(module: Module, params: Params) -> Module:
    """A copy of a module (which may be one of shapes) with the given parameters."""
    graph, state = nnx.split(module)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def shapes(params: Params) -> dict[str, str]:
    """The type and shape of every parameter by its path: `{"embed/embedding": "float32[2048,256]"}`."""
    return {
        name: f"{value.dtype}[{','.join(map(str, value.shape))}]"
        for name, value in sorted(flatten_dict(params, sep="/").items())
    }


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Differences between two tables of names and values, a phrase each."""
    phrases = []
    for name in sorted(there.keys() | here.keys()):
        if name not in here:
            phrases.append(f"{name} {there[name]} exists only there")
        elif name not in there:
            phrases.append(f"{name} {here[name]} exists only here")
        elif there[name] != here[name]:
            phrases.append(f"{name} is {there[name]} there and {here[name]} here")
    return phrases


def listed(phrases: list[str]) -> str:
    """Differences in one line, the first few by name."""
    more = f"; and {len(phrases) - _NAMED} more" if len(phrases) > _NAMED else ""
    return "; ".join(phrases[:_NAMED]) + more


def initial_params(
    fresh: Params,
    base: Params,
    draw: Callable[[set[Any]], Params] | None = None,
    *,
    orders: tuple[Order, Order] = (None, None),
) -> Params:
    """A base model's parameters for a model that may mix tokens in another way.

    Token mixers may differ: what the base lacks of them stays fresh, what only the base has is left out. That is how a
    softmax Transformer becomes a linearized one.

    Args:
        fresh: parameters that have not learnt anything, or their shapes.
        base: the base model's.
        draw: with shapes, draws what stays fresh, given its paths.
        orders: kind of each layer's mixer in the model and in the base, as in `mixer_order`; a layer's mixer is taken
            from the same layer of the base.

    Raises:
        UserError: anything else differs; the message lists what.
    """
    own, given = flatten_dict(fresh), flatten_dict(base)
    partly: dict[Path, dict[int, Any]] = {}
    if orders != (None, None):
        given, partly = _mixers_of_base(own, given, *orders)
    here = {name: kind for name, kind in shapes(fresh).items() if "/mixer/" not in name}
    there = {name: kind for name, kind in shapes(base).items() if "/mixer/" not in name}
    if phrases := differences(there, here):
        raise UserError(f"init_from holds another model: {listed(phrases)}; make the model options equal to its own")
    missing = {path for path, value in own.items() if path not in given or given[path].shape != value.shape}
    new = own if draw is None else flatten_dict(draw(missing)) if missing else {}
    found = {path: (new if path in missing else given)[path] for path in own}
    for path, layers in partly.items():
        for at, value in layers.items():
            found[path] = found[path].at[at].set(value.astype(found[path].dtype))
    return unflatten_dict(found)


def mixer_order(config: ModelConfig) -> Order:
    """Kind of each layer's mixer in a model of several kinds, numbered as in its parameters; None for one kind."""
    attention, count = getattr(config, "attention", None), getattr(config, "num_layers", 0)
    if attention is None or (attention.pattern is None and attention.layers is None):
        return None
    order = numbered(attention.of_layers(count))
    return order if max(order) else None


def _mixers_of_base(
    own: dict[Path, Any], given: dict[Path, Any], order: Order, base_order: Order
) -> tuple[dict[Path, Any], dict[Path, dict[int, Any]]]:
    """A base's parameters under a model's names for mixers; and those that some of a variable's layers have.

    Args:
        own: the model's parameters, or their shapes.
        given: the base's.
        order: kind of each of the model's mixers.
        base_order: kind of each of the base's.

    Returns:
        The base's parameters, and of variables that it has in part their values by place.
    """
    found = {path: value for path, value in given.items() if "mixer" not in path}
    layers = _mixer_layers(given, base_order)
    partly: dict[Path, dict[int, Any]] = {}
    for path, value in own.items():
        if "mixer" not in path:
            continue
        inner, numbers = _mixer_place(path, value.shape[0], order)
        there = {
            at: layers[inner, number]
            for at, number in enumerate(numbers)
            if (inner, number) in layers and layers[inner, number].shape == value.shape[1:]
        }
        if len(there) == len(numbers):
            found[path] = jnp.stack([there[at] for at in range(len(numbers))])
        elif there:
            partly[path] = there
    return found, partly


def _mixer_place(path: Path, count: int, order: Order) -> tuple[Path, list[int]]:
    """A mixer's variable inside its layer, and the numbers of the layers that a stack of it has."""
    inner = path[path.index("mixer") + 1 :]
    if order is None:
        return inner, list(range(count))
    return inner[1:], layers_of_kinds(order)[int(inner[0].removeprefix(KIND))]


def _mixer_layers(params: dict[Path, Any], order: Order) -> dict[tuple[Path, int], Any]:
    """Every layer's mixer, by the path of a variable inside it and the layer's number."""
    found: dict[tuple[Path, int], Any] = {}
    for path, value in params.items():
        if "mixer" in path:
            inner, numbers = _mixer_place(path, value.shape[0], order)
            found |= {(inner, number): value[at] for at, number in enumerate(numbers)}
    return found


def placed(abstract: Any) -> Any:
    """Shapes with a sharding for each array: its own, or the default device of this process."""
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default)

    return jax.tree.map(place, abstract)


def put_like(values: Any, like: Any) -> Any:
    """Values, the same on every host, where other arrays (or shapes) lie."""
    return jax.tree.map(lambda value, other: jax.device_put(value, getattr(other, "sharding", None)), values, like)


def params_fingerprint(params: Params) -> str:
    """Hash of the values, types and names of parameters; the same on every machine."""
    checksums = {name: int(_checksum(value)) for name, value in flatten_dict(params, sep="/").items()}
    content = json.dumps([shapes(params), sorted(checksums.items())])
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def _checksum(values: Any) -> Any:
    """A weighted sum of an array's bits, in integers that wrap around: exact in any order, and fast on any device.

    Small arrays in the host's memory are summed by NumPy, without a program for each shape.
    """
    if values.size > _SMALL or jax.default_backend() != "cpu" or not getattr(values, "is_fully_addressable", True):
        return _checksum_on_device(values)
    narrow = {1: np.uint8, 2: np.uint16}.get(values.dtype.itemsize, np.uint32)
    bits = np.ascontiguousarray(values).view(narrow).astype(np.uint32).ravel()
    weights = np.arange(bits.size, dtype=np.uint32) * np.uint32(2654435761) | np.uint32(1)
    return np.sum(bits * weights, dtype=np.uint32)


@jax.jit
def _checksum_on_device(values: Array) -> Array:
    """A weighted sum of an array's bits."""
    narrow = {1: jnp.uint8, 2: jnp.uint16}.get(values.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(values, narrow).astype(jnp.uint32).ravel()
    weights = jax.lax.iota(jnp.uint32, bits.size) * jnp.uint32(2654435761) | jnp.uint32(1)
    return jnp.sum(bits * weights, dtype=jnp.uint32)
