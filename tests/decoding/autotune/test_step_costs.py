"""Costs of steps: assumed, measured, kept by machine."""

import json
from pathlib import Path

import pytest
from support.samples import build_model

from lin_jax.decoding.autotune import step_costs
from lin_jax.decoding.autotune.step_costs import (
    COMPARED,
    COMPARED_AFTER,
    ENOUGH,
    KEPT,
    LEAST_VISIT,
    LONG_STEP,
    MOST_FACTOR,
    MOST_VISIT,
    TIMED,
    CostFile,
    StepCosts,
    assumed_cost,
    cost_kind,
    size_key,
    time_shape,
    visit_cost,
)
from lin_jax.user_cache import VARIABLE, cache_folder


def test_measurements_take_the_place_of_the_assumption() -> None:
    costs = StepCosts([1, 8])
    assert costs.cost(0) == 1
    assert costs.cost(1) == assumed_cost(8) > 1
    costs.record(1, 4, 1.0)
    assert costs.measured == [[], []]
    costs.record(0, 10, 1.0)
    # One disturbed measurement decides nothing.
    costs.record(1, 4, 100.0)
    assert costs.cost(1) == assumed_cost(8)
    for _ in range(ENOUGH):
        costs.record(1, 4, 0.5)
    assert costs.cost(1) == pytest.approx(1.25)
    costs.record(1, 1, 50.0)
    assert len(costs.measured[1]) == ENOUGH + 1


def test_kept_measurements_hold_for_a_whole_call() -> None:
    """Choices then depend on counts alone, and are the same whenever the same text is decoded."""
    costs = StepCosts([1, 8], [[], [1.5] * ENOUGH])
    costs.record(0, 10, 1.0)
    for _ in range(2 * KEPT):
        costs.record(1, 4, 4.0)
        assert costs.cost(1) == 1.5
    assert costs.measured[1] == [10.0] * KEPT
    assert StepCosts([1, 8], [[], [0.5] * ENOUGH]).cost(1) == 1


def test_what_was_timed_is_known_at_once() -> None:
    """Before a shape is first used; and later calls have it, without another timing."""
    costs = StepCosts([1, 8], timed=True)
    assert costs.is_unknown(1)
    assert not costs.is_unknown(0)
    costs.take(1, [3.2] * TIMED)
    assert costs.cost(1) == 3.2
    assert not costs.is_unknown(1)
    later = StepCosts([1, 8], costs.measured, timed=True)
    assert not later.is_unknown(1)
    assert later.cost(1) == 3.2
    assert not StepCosts([1, 8]).is_unknown(1)
    # A disturbed timing gives way to what steps take in use: the second of those decides.
    costs.record(0, 10, 1.0)
    for cost, expected in ((4.4, 3.2), (4.6, 4.4), (4.8, 4.6)):
        costs.record(1, 4, 0.4 * cost)
        assert costs.cost(1) == pytest.approx(expected)
    assert not costs.is_unknown(1)


def test_one_shape_tells_of_the_others() -> None:
    """What costs more than assumed does so at all sizes, within bounds."""
    costs = StepCosts([1, 2, 8, 16])
    extra = [assumed_cost(size) - 1 for size in (2, 8, 16)]
    costs.take(2, [1 + 2 * extra[1]] * TIMED)
    assert costs.cost(1) == pytest.approx(1 + 2 * extra[0])
    assert costs.cost(2) == pytest.approx(1 + 2 * extra[1])
    assert costs.cost(3) == pytest.approx(1 + 2 * extra[2])
    costs.take(2, [1 + 100 * extra[1]] * TIMED)
    assert costs.cost(1) == pytest.approx(1 + MOST_FACTOR * extra[0])


@pytest.mark.parametrize(("plain_step", "rounds"), [(0.001, 5), (LONG_STEP, 5), (1.0, 1)])
def test_timing_is_short(monkeypatch: pytest.MonkeyPatch, plain_step: float, rounds: int) -> None:
    """On a clock of its own: a few steps of a small model, two of a large one; a disturbed round does not count."""
    clock = [0.0]
    monkeypatch.setattr(step_costs.time, "perf_counter", lambda: clock[0])
    taken: list[tuple[str, int]] = []

    def steps(name: str, seconds: float, count: int) -> int:
        taken.append((name, count))
        disturbed = 3.0 if name == "drafted" and sum(each == name for each, _ in taken) == 3 else 1.0
        clock[0] += count * seconds * disturbed
        return count

    found = time_shape(lambda n: steps("plain", plain_step, n), lambda n: steps("drafted", 2.5 * plain_step, n))
    assert found == pytest.approx([2.5] * TIMED)
    assert len(taken) == 2 + 2 * rounds
    small = plain_step < LONG_STEP
    assert set(taken[2:]) == {("plain", 8 if small else 1), ("drafted", 4 if small else 1)}


def test_syncs_cost_small_models_most() -> None:
    small = build_model("augmented", dtype="float32")
    assert LEAST_VISIT <= visit_cost(small) <= MOST_VISIT
    assert visit_cost(small) == MOST_VISIT


@pytest.mark.parametrize("damage", ["", "{", "[]", "[" * 100_000, '{"8": ["a"]}', '{"8": [-1]}', '{"8": 3}'])
def test_files(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "machine" / "step_costs.json"
    costs = CostFile(file)
    assert costs.load(["4", "8"]) == [[], []]
    costs.save(["4", "8"], [[1.25], []])
    costs.save(["8"], [[1.5, 1.75]])
    assert costs.load(["4", "8", "16"]) == [[1.25], [1.5, 1.75], []]
    file.write_text(damage)
    assert costs.load(["8"]) == [[]]
    costs.save(["4"], [[2.0]])
    assert json.loads(file.read_text())["4"] == [2.0]


def test_nothing_is_kept_where_nothing_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    assert cache_folder() is None
    CostFile().save(["4"], [[2.0]])
    assert CostFile().load(["4"]) == [[]]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file"))
    CostFile().save(["4"], [[2.0]])
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    CostFile().save(["4"], [[2.0]])
    assert CostFile().load(["4"]) == [[2.0]]
    assert cache_folder().parent == tmp_path / "cache"


def test_models_of_one_size_share_costs() -> None:
    one, same, other = (
        build_model(seed=seed, layers=layers, dtype="float32") for seed, layers in ((0, 2), (1, 2), (0, 1))
    )
    assert size_key(one) == size_key(same) != size_key(other)


def test_plain_steps_to_compare_with_are_wanted_where_there_are_none_of_late() -> None:
    costs = StepCosts([1, 8], timed=True)
    assert not costs.wants_plain
    costs.take(1, [1.5] * TIMED)
    assert costs.wants_plain
    costs.record(0, COMPARED, 1.0)
    assert not costs.wants_plain
    costs.record(1, COMPARED_AFTER, 400.0)
    assert costs.wants_plain
    # Costs that are kept for a whole call follow from no clock.
    settled = StepCosts([1, 8], [[], [1.5] * ENOUGH], timed=True)
    settled.record(1, COMPARED_AFTER, 400.0)
    assert not settled.wants_plain


def test_disturbed_rounds_of_a_timing_count_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafted steps use all processors, of which another program has one for most of the time."""
    clock, calls = [0.0], [0]
    monkeypatch.setattr(step_costs.time, "perf_counter", lambda: clock[0])

    def steps(seconds: float, count: int, disturbed: float) -> int:
        calls[0] += 1
        clock[0] += count * seconds * (disturbed if calls[0] > 4 else 1)
        return count

    found = time_shape(lambda n: steps(0.001, n, 1.3), lambda n: steps(0.0025, n, 3.0))
    assert found == pytest.approx([2.5] * TIMED)


def test_steps_of_a_model_with_panels_or_in_int8_are_assumed_to_cost_more(monkeypatch: pytest.MonkeyPatch):
    """Their plain steps are faster; where nothing is known of them, the device's own costs are assumed."""
    monkeypatch.setattr("lin_jax.decoding.autotune.step_costs.instruction_set", lambda: "AVX-512")
    kinds = cost_kind(), cost_kind("panels"), cost_kind("int8")
    assert kinds == ("AVX-512", "AVX-512, panels", "AVX-512, int8")
    assert assumed_cost(8) < assumed_cost(8, kinds[1]) < assumed_cost(8, kinds[2])
    model = build_model("augmented", dtype="float32")
    assert StepCosts.of_model(model, [1, 8]).cost(1) == assumed_cost(8)
    for kind in ("int8", "panels"):
        monkeypatch.setattr(f"lin_jax.decoding.autotune.step_costs.has_{kind}", lambda model: True)
        assert StepCosts.of_model(model, [1, 8]).cost(1) == assumed_cost(8, f"AVX-512, {kind}")
    monkeypatch.setattr("lin_jax.decoding.autotune.step_costs.instruction_set", lambda: "AVX2")
    assert cost_kind("panels") == "cpu"
