"""Forms of products with few rows, against NumPy in float64."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.cells import cells

from lin_jax.models.product_timing import ProductTimes
from lin_jax.models.products import (
    DEFAULTS,
    FORMS,
    SAME_BITS,
    ProductPlan,
    StoredMatrix,
    dequantized,
    panels_of,
    quantized,
    times,
)

INPUTS, OUTPUTS = 70, 33
NUMBERS = np.random.default_rng(0).normal(size=(OUTPUTS, INPUTS)).astype(np.float32)
# From a matrix `[O, I]` to the layout of a form.
LAYOUTS = {"oi": lambda weight: weight, "io": lambda weight: weight.T, "panels": lambda weight: panels_of(weight.T)}
ROWS = np.random.default_rng(1).normal(size=(70, INPUTS)).astype(np.float32)


def stored(weights: str) -> jax.Array:
    return quantized(jnp.asarray(NUMBERS))[0] if weights == "int8" else jnp.asarray(NUMBERS).astype(weights)


@pytest.mark.parametrize(
    ("name", "weights", "compute"),
    cells(
        always=[
            ("sum", "int8", "float32"),
            ("columns", "bfloat16", "float32"),
            ("split", "bfloat16", "float32"),
            ("side by side io", "float32", "float32"),
            ("panels", "float32", "float32"),
        ],
        thorough=[
            (name, weights, compute)
            for name, form in FORMS.items()
            for weights in form.dtypes
            if form.fits(INPUTS, weights)
            for compute in ("float32", "bfloat16")
        ],
    ),
)
def test_a_form_is_the_product(name, weights, compute):
    form, weight = FORMS[name], stored(weights)
    for count in (1, 2, 5):
        x = jnp.asarray(ROWS[:count]).astype(compute)
        found = np.asarray(form.apply(x, LAYOUTS[form.layout](weight)), np.float64)[:, :OUTPUTS]
        expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
        # Sums in float32, whatever the types of rows and weights; XLA's own product rounds weights to the rows' type.
        own = name in ("product", "product io", "side by side io", "panels")
        exact = not own or compute == "float32" or weights == "bfloat16"
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=0, atol=(2e-6 if exact else 2e-2) * np.abs(expected).max())


def test_the_three_terms_of_a_row_are_as_good_as_float32():
    # Rounded to bfloat16 once, the row would be wrong by 2**-9.
    x, weight = jnp.asarray(ROWS[:4]), stored("bfloat16")
    found = np.asarray(jax.jit(FORMS["split"].apply)(x, weight), np.float64)
    expected = ROWS[:4].astype(np.float64) @ np.asarray(weight, np.float64).T
    assert np.abs(found - expected).max() < 2.0**-20 * np.abs(expected).max()


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_rows_have_the_same_bits_whatever_their_number(weights):
    weight, apply = stored(weights), jax.jit(SAME_BITS.apply)
    alone = np.concatenate([np.asarray(apply(jnp.asarray(ROWS[at : at + 1]), weight)) for at in range(3)])
    for count in (3, 8, 16, 40, 70):
        np.testing.assert_array_equal(np.asarray(apply(jnp.asarray(ROWS[:count]), weight))[:3], alone)


@pytest.mark.parametrize("name", ["sum", "columns"])
def test_an_activation_is_not_computed_anew_for_every_output(name):
    def layer(x, weight):
        return FORMS[name].apply(jax.nn.silu(x), weight)

    shapes = (jax.ShapeDtypeStruct((8, INPUTS), "float32"), jax.ShapeDtypeStruct((OUTPUTS, INPUTS), "float32"))
    program = jax.jit(layer).lower(*shapes).compile().as_text()
    loops = [each for each in program.split("\n\n") if " reduce(" in each]
    assert loops
    assert not any(" exponential(" in each or " logistic(" in each for each in loops if "ENTRY" not in each)


def test_int8_rounds_symmetrically_by_the_largest_of_each_output():
    numbers = NUMBERS.copy()
    numbers[4] = 0
    weight, scale = quantized(jnp.asarray(numbers))
    expected = np.abs(numbers).max(axis=1) * np.float32(1 / 127)
    fraction, exponent = np.frexp(np.where(expected > 0, expected, 1))
    # To 17 significant bits, so that products with the integers are exact.
    right = np.ldexp(np.round(fraction * 2**17), exponent - 17)
    np.testing.assert_allclose(np.asarray(scale), right, rtol=1e-7)
    assert np.abs(np.asarray(weight)).max() == 127
    assert not np.asarray(weight)[4].any()
    wrong = np.abs(np.asarray(dequantized(weight, scale)) - numbers)
    assert (wrong <= 0.5001 * np.asarray(scale)[:, None]).all()


@pytest.mark.parametrize("layout", ["io", "oi"])
def test_a_stored_matrix_multiplies_as_its_kernel_does(layout):
    plan = DEFAULTS["float32", layout]
    matrix = StoredMatrix.of(jnp.asarray(NUMBERS.T), plan)
    x = jnp.asarray(ROWS[:6].reshape(2, 3, INPUTS))
    assert matrix.shape == (INPUTS, OUTPUTS)
    np.testing.assert_array_equal(np.asarray(matrix.kernel), NUMBERS.T)
    np.testing.assert_allclose(times(x, matrix), x @ jnp.asarray(NUMBERS.T), rtol=1e-5, atol=1e-5)
    assert times(x[:, :0], matrix).shape == (2, 0, OUTPUTS)


@pytest.mark.parametrize("layout", ["io", "oi"])
def test_few_rows_take_the_panels_of_a_matrix_and_many_the_matrix(layout):
    many = "product io" if layout == "io" else "product"
    matrix = StoredMatrix.of(jnp.asarray(NUMBERS.T), ProductPlan(layout, ((4, "panels"), (64, many))))
    x = jnp.asarray(ROWS[:6])
    # Before they are made, as in a model of shapes, all rows take the matrix.
    expected = np.asarray(ROWS[:6] @ NUMBERS.T)
    np.testing.assert_allclose(matrix(x[:3]), expected[:3], rtol=1e-5, atol=1e-5)
    matrix.add_panels()
    assert matrix.panels.shape == (2, INPUTS, 32)
    np.testing.assert_array_equal(np.asarray(matrix.panels[0]), NUMBERS.T[:, :32])
    np.testing.assert_allclose(matrix(x[:3]), expected[:3], rtol=1e-5, atol=1e-5)
    matrix.panels[...] = jnp.zeros_like(matrix.panels[...])
    assert not matrix(x[:4]).any()
    np.testing.assert_allclose(matrix(x), expected, rtol=1e-5, atol=1e-5)


def test_a_plan_serves_a_number_by_the_next_one():
    plan = ProductPlan("oi", ((1, "product"), (8, "sum"), (64, "split")))
    assert [plan.name(rows) for rows in (1, 2, 8, 9, 64, 1000)] == ["product", "sum", "sum", *["split"] * 3]


def test_the_fastest_form_is_chosen_and_one_row_comes_first():
    seconds = {
        "product io": {1: 1.0, 8: 4.0},
        "product": {1: 1.0, 8: 6.0},
        "sum": {1: 1.02, 8: 1.5},
        "columns": {1: 2.0, 8: 1.4},
    }
    times = ProductTimes(None, {"float32 float32 384x1024": seconds})
    plan = times.plan((400, 1000), "float32", "float32")
    assert plan.layout == "oi"
    assert (plan.name(1), plan.name(8), plan.name(16)) == ("product", "columns", "columns")
    assert plan.name(64) == "product"
    # Where one row would be slower for it, several rows do not count.
    seconds["product"][1] = seconds["sum"][1] = 1.3
    assert times.plan((400, 1000), "float32", "float32") == ProductPlan("io", ((1, "product io"), (8, "product io")))
    # What is a little faster than the usual form may be noise.
    seconds["sum"][8] = seconds["columns"][8] = 0.95
    seconds["product"] = {1: 1.0, 8: 1.0}
    assert times.plan((400, 1000), "float32", "float32").name(8) == "product"


def test_panels_are_chosen_beside_the_layout_that_many_rows_take():
    seconds = {"product io": {1: 1.0, 8: 2.0}, "product": {1: 1.0, 8: 3.0}, "panels": {1: 0.6, 8: 1.9}}
    times = ProductTimes(None, {"float32 float32 384x1024": seconds})
    plan = times.plan((384, 1024), "float32", "float32")
    assert (plan.layout, plan.forms) == ("io", ((1, "panels"), (8, "product io")))
    assert plan.has_panels
    assert not times.plan((384, 1024), "float32", "float32", forms=("product io", "product")).has_panels
    # Clearly faster for all rows that they are for: then more rows take the default.
    seconds["panels"][8] = 1.0
    plan = times.plan((384, 1024), "float32", "float32")
    assert [plan.name(rows) for rows in (1, 8, 9, 64)] == ["panels", "panels", "product io", "product io"]


def test_what_was_not_timed_has_a_default():
    times = ProductTimes(None, {"float32 float32 384x1024": {"sum": {1: 1.0}}})
    assert times.plan((384, 1024), "int8", "float32") == DEFAULTS["int8", "oi"]
    assert times.plan((384, 1024), "float32", "float64") == DEFAULTS["float32", "io"]
    assert times.plan((384, 1024), "float32", "bfloat16", ("oi",)) == DEFAULTS["float32", "oi"]


def test_two_rows_are_timed_where_they_have_a_form_of_their_own():
    times = ProductTimes()
    times.measure([(64, 8)], "int8", "float32", budget=0)
    times.measure([(64, 8)], "float32", "float32", budget=0, forms=["product io"])
    assert set(times.seconds["int8 float32 64x8"]["lanes"]) == {1, 2}
    assert set(times.seconds["int8 float32 64x8"]["columns"]) == {1, 2, 4, 8}
    assert set(times.seconds["float32 float32 64x8"]["product io"]) == {1, 4, 8}


def test_times_are_measured_once_and_kept_by_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    times = ProductTimes.of_this_machine(tmp_path / "new")
    times.measure([(16, 8), (16, 9)], "int8", "float32", rows=(1, 2), budget=0)
    assert list(times.seconds) == ["int8 float32 16x8"]
    assert set(times.seconds["int8 float32 16x8"]) == {"sum", "columns"}
    again = ProductTimes.of_this_machine(tmp_path / "new")
    assert again.seconds == times.seconds
    assert json.loads(again.file.read_text())["device"]
    monkeypatch.setattr("lin_jax.models.product_timing.time_forms", None)
    again.measure([(16, 16)], "int8", "float32")
    monkeypatch.setattr("lin_jax.models.product_timing.device_kind", lambda: "cpu, another model")
    assert ProductTimes.of_this_machine(tmp_path / "new").seconds == {}


@pytest.mark.parametrize(
    "content", ["", "{}", '{"seconds": {"float32": 1}}', '{"seconds": {"a b 1x2": {"sum": {"x": 1}}}}']
)
def test_damaged_times_are_measured_anew(tmp_path: Path, content: str):
    file = ProductTimes.of_this_machine(tmp_path).file
    file.write_text(content)
    assert ProductTimes.of_this_machine(tmp_path).seconds == {}
