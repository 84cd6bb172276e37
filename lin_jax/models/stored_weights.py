"""Weights as they are stored: linear layers and embeddings of a model that decodes, instead of those that learn.

A model that learns has `nnx.Linear`s with kernels `[I, O]`. For decoding, each of them becomes a `StoredLinear`: in
the type and the layout that the file has where that is fast, in int8 if asked for, with the forms of its products
chosen for this machine (`product_timing`). Nothing else of the model changes, and the layers share no code with
training.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int8

from lin_jax.attention.feature_maps import LEARNT_MATRICES, FeatureMap
from lin_jax.devices import instruction_set
from lin_jax.errors import UserError
from lin_jax.models.medusa import MedusaHeads
from lin_jax.models.path_head import PathHead
from lin_jax.models.product_timing import SMALLEST, ProductTimes
from lin_jax.models.products import (
    FORMS,
    SAME_BITS_PLAN,
    Layout,
    ProductPlan,
    StoredMatrix,
    bits_of,
    multiply,
    numbers_of,
    quantized,
)
from lin_jax.models.separate_layers import SeparateLayers
from lin_jax.models.stack import LayerStack

WEIGHTS = ("stored", "int8")
# Numbers in the matrices of a model above which none is there twice.
MOST_IN_PANELS = 2**26


@dataclass(frozen=True)
class WeightStorage:
    """Options of a decoding model's weights.

    Attributes:
        weights: stored keeps the type that they are stored in; int8 rounds those of all linear layers, of the head and
            of the table of tokens, symmetrically, with a factor for each output or token, and learnt feature maps to
            bfloat16's precision.
        same_bits: add up in one order for any number of rows, so that one node and many give the same bits.

    Raises:
        UserError: `weights` is unknown.
    """

    weights: str = "stored"
    same_bits: bool = False

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise UserError(f"weights '{self.weights}' are unknown; choose one of {', '.join(WEIGHTS)}")


class StoredLinear(nnx.Module):
    """A linear layer that decodes: `x @ W + b`, added up in float32 or better.

    Attributes:
        matrix: W.
        bias: b, `[O]`, or None.
        dtype: type of the outputs.
        param_dtype: type of the parameters of the layer that it was.
    """

    def __init__(self, matrix: StoredMatrix, bias: Any, dtype: Any, param_dtype: Any) -> None:
        self.matrix, self.bias = matrix, bias
        self.dtype, self.param_dtype = dtype, param_dtype

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """Applies the layer."""
        found = self.matrix(x.astype(self.dtype))
        if self.bias is not None:
            found = found + self.bias[...].astype(found.dtype)
        return found.astype(self.dtype)

    def learning(self) -> nnx.Linear:
        """The layer as models that learn have it."""
        size_in, size_out = self.matrix.shape
        layer = nnx.eval_shape(
            lambda: nnx.Linear(
                size_in,
                size_out,
                use_bias=self.bias is not None,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                rngs=nnx.Rngs(0),
            )
        )
        layer.kernel = nnx.Param(self.matrix.kernel)
        layer.bias = self.bias
        return layer


class StoredEmbedding(nnx.Module):
    """A table of vectors that may also be the head of a model that decodes.

    A CPU has no bfloat16: to look a row of such a table up, XLA makes the whole table float32. So it is looked up as
    its bits, in integers, and the head is a second view of the same memory.

    Attributes:
        embedding: the table `[V, E]`, in the type that it is stored in, in int8, or the bits of its bfloat16 numbers.
        scale: `[V]` factor of each row of an int8 table; None for one of floating point.
        head: the matrix of a tied head, if that is the numbers of the bits; None is the table itself.
        plan: forms of the products with the table.
        tied: whether it is the head.
        num_embeddings: V.
        dtype: type of the vectors.
    """

    def __init__(self, table: nnx.Embed, plan: ProductPlan, *, tied: bool, int8: bool) -> None:
        numbers = table.embedding.get_value()
        self.embedding = nnx.Param(numbers if int8 else bits_of(numbers))
        self.plan, self.tied, self.int8 = plan, tied, int8
        self.scale: Any = None
        self.head: StoredMatrix | None = None
        self.num_embeddings, self.dtype = table.num_embeddings, table.dtype

    def __call__(self, inputs: Int[Array, "*batch"]) -> Float[Array, "*batch E"]:
        """The vectors of tokens."""
        rows = numbers_of(jnp.take(self.embedding[...], inputs, axis=0))
        if self.scale is not None:
            factors = jnp.take(self.scale[...], inputs)[..., None]
            rows = rows.astype(factors.dtype) * factors
        return rows.astype(self.dtype)

    def attend(self, query: Float[Array, "*batch E"]) -> Float[Array, "*batch V"]:
        """Products of vectors with all vectors of the table: logits of a head that is tied to it."""
        query = query.astype(self.dtype)
        if self.head is not None:
            return self.head(query)
        rows = query.reshape(-1, query.shape[-1])
        found = multiply(rows, self.embedding[...], self.plan.form(rows.shape[0]))
        if self.scale is not None:
            found = found * self.scale[...].astype(found.dtype)
        return found.reshape(*query.shape[:-1], -1)

    def finish(self) -> None:
        """Rounds the table to int8, or makes the matrix of a tied head, once the table is there."""
        if isinstance(self.embedding.get_value(), jax.ShapeDtypeStruct):
            return
        if self.int8:
            # Their pages, if they are a file's, are let go of afterwards.
            self.set_rounded(*jax.block_until_ready(quantized(self.embedding[...])))
        elif self.tied and self.embedding.dtype == jnp.uint16:
            # JAX takes memory that lies as its own arrays do without copying it.
            weight = jax.device_put(np.asarray(self.embedding[...]).view(ml_dtypes.bfloat16))
            self.head = nnx.data(StoredMatrix(weight, self.plan))

    def set_rounded(self, weight: Int8[Array, "V E"], scale: Float[Array, " V"]) -> None:
        """Puts an int8 table and the factors of its rows in the place of the table."""
        self.embedding = nnx.Param(weight)
        self.scale = nnx.data(nnx.Param(scale))


@dataclass(frozen=True)
class Storage:
    """Chooses how each matrix of a model is stored.

    Attributes:
        options: what was asked for.
        times: times of products on this machine; None is another device than a CPU, where nothing changes but what is
            asked for.
        rewrites: write products of two numbers of one type in all forms. With AVX-512, XLA's own are faster in whole
            programs than most, whatever a form promises alone: 1.14 ms a token and 1.90 ms for 8 nodes of the demo's
            model, against 1.23 and 2.37 ms. There, such a product is XLA's own or one of panels.
        panels: whether matrices may be there a second time, as panels.
    """

    options: WeightStorage
    times: ProductTimes | None = None
    rewrites: bool = True
    panels: bool = True

    @property
    def int8(self) -> bool:
        """True where matrices are rounded to int8."""
        return self.options.weights == "int8"

    def plan(
        self, shape: tuple[int, int], stored: Any, compute: Any, layouts: Sequence[Layout] = ("io", "oi")
    ) -> ProductPlan | None:
        """Layout and forms for a matrix; None leaves it as it is.

        Args:
            shape: numbers of inputs and outputs.
            stored: type of its numbers.
            compute: type of the rows.
            layouts: those that it can be stored in.
        """
        stored, compute = jnp.dtype(stored).name, jnp.dtype(compute).name
        if self.options.same_bits:
            return SAME_BITS_PLAN
        weights = "int8" if self.int8 else stored
        if self.times is None:
            return ProductPlan("oi", ((1, "product"),)) if self.int8 else None
        if not self.int8 and (shape[0] * shape[1] < SMALLEST or "float64" in (stored, compute)):
            return None
        if compute == "float64":
            return ProductPlan("oi", ((1, "product"),))
        # What is stored by its outputs alone is a table, which has no panels.
        forms = [name for name in self.forms(weights, compute) if name != "panels" or "io" in layouts]
        if not any(FORMS[name].layout in layouts for name in forms):
            return None
        plan = self.times.plan(shape, weights, compute, layouts, forms)
        unchanged = stored == compute and {name for _, name in plan.forms} == {"product io"}
        return None if unchanged else plan

    def forms(self, weights: str, compute: str) -> tuple[str, ...]:
        """Names of the forms that a product may have, by the types of weights and rows."""
        names = tuple(FORMS) if self.rewrites or weights != compute else ("product io", "panels")
        return tuple(name for name in names if name != "panels" or self.panels)


def storage_for(model: Any, options: WeightStorage, times: ProductTimes | None = None, *heads: Any) -> Storage:
    """Chooses how the matrices of a model are stored on this machine, and times products if that is not known yet.

    Args:
        model: the model, which may be abstract.
        options: what is asked for.
        times: times of products; None takes those of this machine.
        heads: draft heads that go with it.
    """
    if jax.default_backend() != "cpu":
        return Storage(options)
    times = times if times is not None else ProductTimes.of_this_machine()
    work: dict[tuple[tuple[int, int], str, str], int] = {}
    for shape, stored, compute in (each for part in (model, *heads) for each in _matrices(part)):
        if shape[0] * shape[1] >= SMALLEST and "float64" not in (stored, compute):
            key = (shape, "int8" if options.weights == "int8" else stored, compute)
            work[key] = work.get(key, 0) + shape[0] * shape[1]
    storage = Storage(options, times, instruction_set() != "AVX-512", sum(work.values()) <= MOST_IN_PANELS)
    if not options.same_bits:
        for weights, compute in dict.fromkeys(key[1:] for key in work):
            shapes = [key[0] for key in sorted(work, key=lambda key: -work[key]) if key[1:] == (weights, compute)]
            if len(forms := storage.forms(weights, compute)) > 1:
                times.measure(shapes, weights, compute, forms=forms)
    return storage


def _matrices(model: Any) -> Iterator[tuple[tuple[int, int], str, str]]:
    """Shapes and types of a module's matrices, once for each that a token is multiplied with."""
    for _, node in nnx.iter_modules(model):
        if isinstance(node, nnx.Linear):
            *stack, size_in, size_out = node.kernel.shape
            for _ in range(stack[0] if stack else 1):
                yield (size_in, size_out), node.kernel.dtype.name, jnp.dtype(node.dtype or node.param_dtype).name
    if getattr(model, "head", ()) is None and isinstance(getattr(model, "embed", None), nnx.Embed):
        table = model.embed.embedding
        yield table.shape[::-1], table.dtype.name, jnp.dtype(model.embed.dtype).name


def store(model: Any, storage: Storage) -> None:
    """Stores a model's matrices for decoding, in place; its layers are no stack, and it may be abstract.

    An abstract model's matrices are rounded to int8 when they are there: see `finish_at`.
    """
    for path, layer in list(nnx.iter_modules(model)):
        if isinstance(layer, nnx.Linear) and layer.kernel.ndim == 2:
            plan = storage.plan(layer.kernel.shape, layer.kernel.dtype, layer.dtype)
            if plan is not None:
                matrix = StoredMatrix.of(layer.kernel.get_value(), plan)
                put(model, path, StoredLinear(matrix, layer.bias, layer.dtype, layer.param_dtype))
                del layer
                _finish(storage, matrix)
        elif isinstance(layer, FeatureMap) and storage.int8:
            for name in LEARNT_MATRICES:
                _narrow(layer, name)
    _store_embedding(model, storage)


def _narrow(features: FeatureMap, name: str) -> None:
    """Rounds a learnt matrix to the numbers that bfloat16 has, in place; it keeps its type, once it is there."""
    matrix = getattr(features, name, None)
    if isinstance(matrix, nnx.Param) and isinstance(matrix.get_value(), jax.Array):
        matrix.set_value(jax.lax.reduce_precision(matrix.get_value(), exponent_bits=8, mantissa_bits=7))


def _finish(storage: Storage, matrix: StoredMatrix) -> None:
    """Rounds a matrix to int8, or makes its panels, once it is there."""
    if isinstance(matrix.weight.get_value(), jax.ShapeDtypeStruct):
        return
    if storage.int8:
        matrix.quantize()
    else:
        matrix.add_panels()


def _store_embedding(model: Any, storage: Storage) -> None:
    """Stores the model's table of tokens; where it is no head, it is only read row by row."""
    table = getattr(model, "embed", None)
    if not isinstance(table, nnx.Embed):
        return
    tied = getattr(model, "head", ()) is None
    # Stored by its rows, which are the outputs of a tied head.
    plan = storage.plan(table.embedding.shape[::-1], table.embedding.dtype, table.dtype, ("oi",)) if tied else None
    read_alone = storage.times is not None and table.embedding.dtype == jnp.bfloat16
    if plan is None and not read_alone and not storage.int8:
        return
    model.embed = StoredEmbedding(table, plan or ProductPlan("oi", ((1, "columns"),)), tied=tied, int8=storage.int8)
    model.embed.finish()


def store_heads(heads: Any, storage: Storage, compute: Any) -> None:
    """Stores the matrices of draft heads, in place.

    Args:
        heads: a `MedusaHeads` or a `PathHead`.
        storage: as for the model.
        compute: type of the hidden vectors that they read.
    """

    def planned(kernel: Any) -> ProductPlan | None:
        return storage.plan(kernel.shape[-2:], kernel.dtype, compute)

    def stored(kernel: Any) -> Any:
        plan = planned(kernel)
        if plan is None:
            return nnx.Param(kernel)
        matrix = StoredMatrix.of(kernel, plan)
        _finish(storage, matrix)
        return matrix

    if isinstance(heads, PathHead):
        for name in ("projection", "inner", "outer", "output"):
            setattr(heads, name, stored(getattr(heads, name).get_value()))
    elif isinstance(heads, MedusaHeads) and (planned(heads.weight[...]) or planned(heads.output[...])):
        for name in ("weight", "output"):
            setattr(heads, name, nnx.List([stored(each) for each in getattr(heads, name)[...]]))


def separate_shapes(stack: LayerStack) -> SeparateLayers:
    """The layers of an abstract stack; what is not abstract in it is cut."""
    graph, state = nnx.split(stack.layers)

    def cut(leaf: Any, layer: int) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        return leaf[layer]

    layers = range(stack.count)
    return SeparateLayers(nnx.merge(graph, jax.tree.map(lambda leaf, at=at: cut(leaf, at), state)) for at in layers)


def finish_at(model: Any, path: tuple[Any, ...], storage: Storage) -> None:
    """Finishes the matrix or table that the variable at a path belongs to: rounded, or a second copy, once filled."""
    holder = module_at(model, path[:-1])
    if isinstance(holder, FeatureMap) and path[-1] in LEARNT_MATRICES and storage.int8:
        _narrow(holder, path[-1])
    elif isinstance(holder, StoredEmbedding):
        holder.finish()
    elif isinstance(holder, StoredMatrix):
        _finish(storage, holder)


def restored(model: Any) -> Any:
    """The model with the layers that models that learn have: itself, if it has no others.

    What was rounded to int8 stays so.
    """
    found = [
        (path, node)
        for path, node in nnx.iter_modules(model)
        if isinstance(node, StoredLinear) and node.matrix.scale is None
    ]
    if not found and not isinstance(getattr(model, "embed", None), StoredEmbedding):
        return model
    model = nnx.merge(*nnx.split(model))
    for path, node in found:
        put(model, path, node.learning())
    if isinstance(model.embed, StoredEmbedding) and model.embed.scale is None:
        model.embed.embedding = nnx.Param(numbers_of(model.embed.embedding[...]))
        model.embed.head = None
    return model


def weight_bytes(model: Any) -> int:
    """Bytes of a model's weights; a matrix that is there as panels, too, counts once."""
    leaves = nnx.to_flat_state(nnx.state(model))
    return sum(leaf[...].nbytes for path, leaf in leaves if path[-1] != "panels")


def has_panels(model: Any) -> bool:
    """True for a model some of whose matrices are there as panels, too."""
    return any(path[-1] == "panels" for path, _ in nnx.to_flat_state(nnx.state(model)))


def has_int8(model: Any) -> bool:
    """True for a model some of whose matrices are in int8."""
    return any(leaf.dtype == jnp.int8 for _, leaf in nnx.to_flat_state(nnx.state(model)))


def module_at(model: Any, path: tuple[Any, ...]) -> Any:
    """The module at a path: names of attributes, and numbers in lists."""
    for part in path:
        model = model[part] if isinstance(part, int) else getattr(model, part)
    return model


def put(model: Any, path: tuple[Any, ...], module: nnx.Module) -> None:
    """Puts a module in the place of the one at a path."""
    holder = module_at(model, path[:-1])
    if isinstance(path[-1], int):
        holder[path[-1]] = module
    else:
        setattr(holder, path[-1], module)


Build = Callable[[Any], Any]


def computed_in(model: Any, dtype: str, build: Build) -> Any:
    """The same parameters in a model that computes in another type.

    Args:
        model: the model.
        dtype: type of activations.
        build: makes an abstract model of a configuration.
    """
    if model.config.dtype == dtype:
        return model
    graph = nnx.graphdef(build(replace(model.config, dtype=dtype)))
    return nnx.merge(graph, nnx.state(model))
