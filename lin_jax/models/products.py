"""Products of a few rows with a weight matrix: several ways to write `x @ W`, and a matrix that knows which is fastest.

Decoding multiplies one row, or the few nodes of a draft tree, with every weight of the model. On a CPU that is a matter
of how fast the weights are read, and XLA reads them at very different speeds depending on how the product is written: a
matrix in bfloat16, say, is first converted as a whole, at every token. So there are several forms of the one product,
and a `ProductPlan` says which of them serves which number of rows; `product_timing` finds that out on a machine.

Order of the sums. `product` and `split` leave it to XLA's library, which may choose another one for another number of
rows. `sum` and `columns` are one loop over the inputs for each output, unrolled and vectorised in the same way for
every number of rows (two or more: one row is doubled), so that a row's result does not depend on the rows beside it;
a test holds that. All forms add up in float32 or better. `lanes`, the fastest for one row of narrow weights, is in a
file of its own.

Panels. Beside its own layout, a matrix may be there a second time, cut into panels of a few outputs each, which lie in
one piece: the few rows of a step are multiplied with them as a batch of small products, which read memory up to twice
as fast. Many rows are slower so, and take the matrix itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int8

from lin_jax.models.lane_sums import MOST_ROWS, has_lanes, lane_sums
from pallas_kernels.ordering import computed
from pallas_kernels.precision import upcast

# Axes of a stored matrix: inputs first, as in `nnx.Linear`, or outputs first, as in PyTorch and its checkpoints.
Layout = Literal["io", "oi"]
# Outputs of a panel: with 16 or 64, one row takes 1.3 and 1.6 times as long (two AVX-512 cores).
PANEL = 32
# Rows that forms are chosen for; a number in between is served by the form of the next one.
ROWS = (1, 2, 4, 8, 16, 64)
# Bits of exponent and fraction of a bfloat16.
_BFLOAT16 = (8, 7)
# Weights that are rounded to int8 at a time, which takes some float32 numbers for each.
_ROUNDED = 2**22
# Bits of the fraction of an int8 weight's factor: its products with 7-bit integers are exact in float32.
_FACTOR_BITS = 16
# Rows of a block of the form whose order of sums does not depend on the number of rows.
_BLOCK = 8


def _exact(x: Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def _doubled(x: Float[Array, "n I"]) -> Float[Array, "m I"]:
    """One row twice: XLA writes a product with a single row as another loop, which is many times slower."""
    return jnp.concatenate([x, x]) if x.shape[0] == 1 else x


def _contract(x: Array, weight: Array, axis: int) -> Array:
    return jax.lax.dot_general(x, weight, (((1,), (axis,)), ((), ())), preferred_element_type=_exact(x))


def bits_of(table: Any) -> Any:
    """A bfloat16 array, or its shape, as the integers that its numbers' bits are; others as they are."""
    if table.dtype != jnp.bfloat16:
        return table
    if isinstance(table, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(table.shape, jnp.uint16)
    return jax.lax.bitcast_convert_type(table, jnp.uint16)


def numbers_of(bits: Array) -> Array:
    """The inverse of `bits_of`."""
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16) if bits.dtype == jnp.uint16 else bits


def _product(x: Float[Array, "n I"], weight: Array, axis: int) -> Float[Array, "n O"]:
    """XLA's own product; a matrix of another type is converted as a whole."""
    return _contract(x, weight.astype(x.dtype), axis)


def _sum(x: Float[Array, "n I"], weight: Array) -> Float[Array, "n O"]:
    """Multiplies and sums in one loop, row by row; weights are converted in registers."""
    rows, exact = _doubled(computed(x)), _exact(x)
    return jnp.sum(weight.astype(exact)[None] * rows.astype(exact)[:, None], axis=-1)[: x.shape[0]]


def _columns(x: Float[Array, "n I"], weight: Array) -> Float[Array, "n O"]:
    """Multiplies and sums in one loop, output by output, so that all rows meet a weight while it is at hand."""
    rows, exact = _doubled(computed(x)), _exact(x)
    return jnp.sum(weight.astype(exact)[:, None] * rows.astype(exact)[None], axis=-1).T[: x.shape[0]]


def _split(x: Float[Array, "n I"], weight: Array) -> Float[Array, "n O"]:
    """A product in bfloat16, whose hardware adds up in float32; a float32 row is three rows whose sum it is.

    A float32 number is the sum of three bfloat16 numbers, and the product of two of those is a float32 number: nothing
    is rounded that a product in float32 would not round.
    """
    terms = [x]
    if x.dtype != jnp.bfloat16:
        first = jax.lax.reduce_precision(x, *_BFLOAT16)
        second = jax.lax.reduce_precision(x - first, *_BFLOAT16)
        terms = [first, second, x - first - second]
    rows = _doubled(jnp.concatenate([each.astype(jnp.bfloat16) for each in terms]))
    found = _contract(rows, weight.astype(jnp.bfloat16), 1)[: len(terms) * x.shape[0]]
    return jnp.sum(found.reshape(len(terms), *x.shape[:1], -1), axis=0)


def _side_by_side(x: Float[Array, "n I"], weight: Array) -> Float[Array, "n O"]:
    """A product for each row: for two or three of them, XLA's loop for one row may be that much faster."""
    return jnp.concatenate([_product(x[at : at + 1], weight, 0) for at in range(x.shape[0])])


def panels_of(kernel: Float[Array, "I O"]) -> Float[Array, "P I N"]:
    """A matrix as panels of `PANEL` outputs each, which lie one after the other; the last is filled up with zeros."""
    size_in, size_out = kernel.shape
    filled = jnp.pad(kernel, ((0, 0), (0, -size_out % PANEL)))
    return jnp.moveaxis(filled.reshape(size_in, -1, PANEL), 1, 0)


def _panels(x: Float[Array, "n I"], weight: Float[Array, "P I N"]) -> Float[Array, "n O"]:
    """A batch of products, one for each panel; outputs of the last panel that are none are still there."""
    rows = jnp.broadcast_to(x, (weight.shape[0], *x.shape))
    found = jax.lax.dot_general(
        rows, weight.astype(x.dtype), (((2,), (1,)), ((0,), (0,))), preferred_element_type=_exact(x)
    )
    return jnp.moveaxis(found, 0, 1).reshape(x.shape[0], -1)


def _blocks(x: Float[Array, "n I"], weight: Array) -> Float[Array, "n O"]:
    """`sum` over blocks of as many rows each, since XLA writes it otherwise for many rows."""
    count = x.shape[0]
    blocks = jnp.pad(x, ((0, -count % _BLOCK), (0, 0))).reshape(-1, _BLOCK, x.shape[1])

    def one(rows: Array) -> Array:
        return jax.lax.optimization_barrier(_sum(jax.lax.optimization_barrier(rows), weight))

    found = one(blocks[0])[None] if len(blocks) == 1 else jax.lax.map(one, blocks)
    return found.reshape(-1, weight.shape[0])[:count]


class Form(NamedTuple):
    """A way to write a product.

    Attributes:
        layout: axes of the matrix; panels is the second copy of a matrix of either layout.
        apply: `apply(x, weight)`, `[n, I]` with the matrix to `[n, O]`, in float32 or better.
        most: number of rows above which it is not worth trying.
        dtypes: types of weights that it is worth trying for with few rows.
        fits: whether it is possible for a number of inputs and a type of weights.
    """

    layout: Layout | Literal["panels"]
    apply: Callable[[Array, Array], Array]
    most: int = 1 << 30
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "int8")
    fits: Callable[[int, str], bool] = lambda size_in, weights: True


FORMS: dict[str, Form] = {
    "product": Form("oi", lambda x, weight: _product(x, weight, 1), dtypes=("float32",)),
    "sum": Form("oi", _sum, 16),
    "columns": Form("oi", _columns, 16),
    "split": Form("oi", _split, dtypes=("bfloat16",)),
    "lanes": Form("oi", lane_sums, MOST_ROWS, ("bfloat16", "int8"), has_lanes),
    "product io": Form("io", lambda x, weight: _product(x, weight, 0), dtypes=("float32",)),
    "side by side io": Form("io", _side_by_side, 4, ("float32",)),
    "panels": Form("panels", _panels, 8, ("float32",)),
}
# The form that adds up in one order whatever the number of rows.
SAME_BITS = Form("oi", _blocks)


@dataclass(frozen=True)
class ProductPlan:
    """Forms of the products with one matrix.

    Attributes:
        layout: axes of the matrix.
        forms: name of a form for each of some numbers of rows, in ascending order; without any, one form for all
            numbers of rows that adds up in one order.
    """

    layout: Layout
    forms: tuple[tuple[int, str], ...]

    def form(self, rows: int) -> Form:
        """The form for a number of rows: that of the next larger number, or of the largest."""
        return FORMS[self.name(rows)] if self.forms else SAME_BITS

    def name(self, rows: int) -> str:
        """Name of the form for a number of rows."""
        return next((name for most, name in self.forms if rows <= most), self.forms[-1][1])

    @property
    def of_many_rows(self) -> Form:
        """The form for the largest number of rows."""
        return FORMS[self.forms[-1][1]]

    @property
    def has_panels(self) -> bool:
        """True if some number of rows takes the matrix as panels."""
        return any(FORMS[name].layout == "panels" for _, name in self.forms)


# What is done where nothing was timed, by type of weights and layout, the preferred layout first: in float32 as in
# `nnx.Linear`; for other types, what no machine is slow at.
DEFAULTS: dict[tuple[str, Layout], ProductPlan] = {
    ("float32", "io"): ProductPlan("io", ((1, "product io"),)),
    ("float32", "oi"): ProductPlan("oi", ((1, "product"),)),
    ("bfloat16", "oi"): ProductPlan("oi", ((16, "columns"), (64, "split"))),
    ("int8", "oi"): ProductPlan("oi", ((16, "columns"), (64, "product"))),
}
SAME_BITS_PLAN = ProductPlan("oi", ())


def multiply(x: Float[Array, "n I"], weight: Array, form: Form) -> Float[Array, "n O"]:
    """The product in a form, in float32 or better."""
    if weight.dtype != x.dtype:
        # A loop's body converts its weights anew at every turn: before the loop, XLA would convert all of the model.
        x, weight = jax.lax.optimization_barrier((x, weight))
    return form.apply(x, weight)


class StoredMatrix(nnx.Module):
    """A matrix in the type that it is stored in, with the forms of the products with it.

    Attributes:
        weight: `[I, O]` or `[O, I]`, as the plan says.
        scale: `[O]` factor of each output's int8 weights; None for weights of floating point.
        panels: the same matrix as panels, if the plan has a use for them and the weights are there.
        plan: forms of the products.
    """

    def __init__(self, weight: Any, plan: ProductPlan, scale: Any = None) -> None:
        self.plan = plan
        self.weight = nnx.Param(weight)
        self.scale = None if scale is None else nnx.Param(scale)
        self.panels: Any = None

    @classmethod
    def of(cls, kernel: Any, plan: ProductPlan) -> "StoredMatrix":
        """Stores a kernel `[I, O]`, an array or only its shape, as a plan wants it."""
        if plan.layout == "io":
            return cls(kernel, plan)
        if isinstance(kernel, jax.ShapeDtypeStruct):
            return cls(jax.ShapeDtypeStruct(kernel.shape[::-1], kernel.dtype), plan)
        return cls(kernel.T, plan)

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of inputs and outputs."""
        first, second = self.weight.shape
        return (first, second) if self.plan.layout == "io" else (second, first)

    @property
    def kernel(self) -> Float[Array, "I O"]:
        """The matrix as `nnx.Linear` has it, in float32 if it is int8."""
        weight = self.weight[...] if self.scale is None else dequantized(self.weight[...], self.scale[...])
        return weight if self.plan.layout == "io" else weight.T

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """`x @ W` in float32 or better."""
        rows = x.reshape(-1, x.shape[-1])
        if not rows.shape[0]:
            return jnp.zeros((*x.shape[:-1], self.shape[1]), _exact(x))
        form, weight = self.plan.form(rows.shape[0]), self.weight
        if form.layout == "panels":
            form, weight = (form, self.panels) if self.panels is not None else (self.plan.of_many_rows, weight)
        found = multiply(rows, weight[...], form)[:, : self.shape[1]]
        if self.scale is not None:
            found = found * self.scale[...].astype(found.dtype)
        return found.reshape(*x.shape[:-1], -1)

    def add_panels(self) -> None:
        """Makes the matrix's panels if the plan has a use for them, once the weights are there."""
        if self.plan.has_panels and not isinstance(self.weight.get_value(), jax.ShapeDtypeStruct):
            self.panels = nnx.data(nnx.Param(_made_panels(self.kernel)))

    def quantize(self) -> None:
        """Turns the weights into int8, in place, and waits for that; they are stored outputs first."""
        self.set_rounded(*jax.block_until_ready(quantized(self.weight[...])))

    def set_rounded(self, weight: Int8[Array, "O I"], scale: Float[Array, " O"]) -> None:
        """Puts int8 weights and their factors in the place of the weights."""
        self.weight = nnx.Param(weight)
        self.scale = nnx.data(nnx.Param(scale))


_made_panels = jax.jit(panels_of)


def times(x: Float[Array, "*batch I"], matrix: Any) -> Float[Array, "*batch O"]:
    """`x @ W` in the type of x, for a parameter `[I, O]` or a stored matrix."""
    if isinstance(matrix, StoredMatrix):
        return matrix(x).astype(x.dtype)
    return x @ matrix[...].astype(x.dtype)


def quantized(weight: Float[Array, "O I"]) -> tuple[Int8[Array, "O I"], Float[Array, " O"]]:
    """Rounds to int8, symmetrically, with a factor for each output: `weight ~ int8 * scale`; some outputs at a time.

    What `dequantized` makes of both is exact, and is rounded to the same again.
    """
    size = max(_ROUNDED // weight.shape[1], 1)
    parts = [_quantized(weight[at : at + size]) for at in range(0, weight.shape[0], size)]
    rounded, scales = zip(*parts, strict=True)
    return (rounded[0], scales[0]) if len(parts) == 1 else (jnp.concatenate(rounded), jnp.concatenate(scales))


@jax.jit
def _quantized(weight: Float[Array, "O I"]) -> tuple[Int8[Array, "O I"], Float[Array, " O"]]:
    exact = upcast(weight)
    largest = jnp.max(jnp.abs(exact), axis=1)
    # Not divided: compilers make that a product, here and there.
    scale = jnp.where(largest > 0, largest * (1 / 127), 1).astype(jnp.float32)
    scale = jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=_FACTOR_BITS)
    return jnp.round(exact / scale[:, None]).astype(jnp.int8), scale


def dequantized(weight: Int8[Array, "O I"], scale: Float[Array, " O"]) -> Float[Array, "O I"]:
    """The matrix that int8 weights and their factors stand for, in float32."""
    return weight.astype(jnp.float32) * scale[:, None]
