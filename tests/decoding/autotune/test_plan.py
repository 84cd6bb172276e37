"""Trees by growth, expected tokens against decoding, and files of plans."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.samples import VOCABULARY, KnowingDrafter, build_model, padded

from lin_jax.decoding import DynamicTree, Generator
from lin_jax.decoding.autotune.costs import Costs
from lin_jax.decoding.autotune.plan import SpeculationPlan, dynamic_tokens, grow_tree, load_plans, save_plans
from lin_jax.decoding.autotune.replay import draft_accuracy, dynamic_tree_ranks
from lin_jax.devices import device_kind
from lin_jax.errors import UserError

COSTS = [Costs(1, (1, 2), (0.1, 0.2))]


def test_grown_tree_is_what_it_claims() -> None:
    rng = np.random.default_rng(2)
    hits = rng.random((3, 100, 3, 4)) < np.array([0.5, 0.2, 0.1, 0.05])
    trees = grow_tree(hits, 9)
    assert [tree.size for tree, _ in trees] == list(range(1, 10))
    for tree, expected in trees:
        step_tokens = []
        for text in hits:
            place = 0
            while place < len(text):
                hit = text[place]
                step_tokens.append(
                    1 + max((len(p) for p in tree.paths if all(hit[d, r] for d, r in enumerate(p))), default=0)
                )
                place += step_tokens[-1]
        assert expected == pytest.approx(np.mean(step_tokens))


@pytest.mark.thorough
def test_what_texts_promise_is_what_decoding_gives() -> None:
    """Tokens a step, foretold from hits and from places in dynamic trees, against the loop on the same texts."""
    model = build_model("augmented", dtype="float32")
    prompts = np.random.default_rng(0).integers(0, VOCABULARY, (3, 20)).tolist()
    texts = Generator(model).generate(prompts, 200).tokens
    drafter = KnowingDrafter(padded(prompts, texts), 3, 0.7)
    fixed, promised = grow_tree(draft_accuracy(model, drafter, prompts, texts, depth=4), 9)[-1]
    dynamic = DynamicTree(6, 3, 2, 3)
    places = dynamic_tree_ranks(model, drafter, prompts, texts, dynamic)[:, :, -1]
    foretold = dict(dynamic_tokens(places, dynamic.size))[dynamic.size]
    for tree, expected in ((fixed, promised), (dynamic, foretold)):
        done = Generator(model, drafter=drafter, tree=tree).generate(prompts, 200)
        assert done.tokens == texts
        assert expected > 1.5
        # What is left at the ends of the texts is all that differs.
        assert done.mean_accepted_tokens == pytest.approx(expected, rel=0.03)


def test_replay_needs_texts_longer_than_the_tree() -> None:
    model = build_model("augmented", dtype="float32")
    drafter = KnowingDrafter(np.zeros((1, 8), np.int32), 3, 0.7)
    with pytest.raises(UserError, match=r"texts of 5 tokens are too short for .* depth 4; give longer ones"):
        draft_accuracy(model, drafter, [[1]], [[1, 2, 3, 4, 5]], depth=4)


def test_plans_are_kept(tmp_path: Path) -> None:
    path, plans = tmp_path / "speculation.json", [SpeculationPlan("ngram", 1, "0;1", device_kind(), 1.5)]
    assert load_plans(path) == ([], [])
    save_plans(path, plans, COSTS)
    assert load_plans(path) == (plans, COSTS)


@pytest.mark.parametrize(
    "change",
    [
        {"worth": 1.5},  # a field of an earlier version
        {"machine": "cpu"},
        {"device": "another device"},
        {"device": None},
        {"tree": 5},
        {"tree": "sheep"},
        {"tree": "chain:100000"},
        {"slots": "1"},
        {"drafter": ["ngram"]},
        {"break_even_tokens": "x"},
        {"measured_speedup": None},
        {"measured_speedup": float("nan")},
    ],
)
def test_plans_of_another_version_or_device_are_measured_anew(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "speculation.json"
    save_plans(path, [SpeculationPlan("ngram", 1, "0;1", device_kind())], COSTS)
    content = json.loads(path.read_text())
    content["plans"][0] |= change
    path.write_text(json.dumps(content))
    assert load_plans(path) == ([], [])


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "[" * 100_000, '{"plans": []}', '{"plans": [], "costs": [{"slots": 1}]}'),
        '{"plans": [], "costs": [{"slots": 1, "sizes": [1, 2], "seconds": [0.1]}]}',
        '{"plans": [], "costs": [{"slots": 1, "sizes": [], "seconds": []}]}',
        '{"plans": [], "costs": [{"slots": 1, "sizes": [1], "seconds": ["a"]}]}',
        '{"plans": {}, "costs": [{"slots": 1}]}',
        "\xff",
    ],
)
def test_files_that_are_no_plans_are_measured_anew(tmp_path: Path, text: str) -> None:
    path = tmp_path / "speculation.json"
    path.write_bytes(text.encode("latin-1"))
    assert load_plans(path) == ([], [])


def test_two_writers_keep_both_plans(tmp_path: Path) -> None:
    """Each has read the file before the other wrote it; a file in pieces is never there."""
    path = tmp_path / "speculation.json"
    first, second = (SpeculationPlan(kind, 1, "0;1", device_kind()) for kind in ("ngram", "self"))
    more = Costs(4, (1, 2), (0.3, 0.4))
    save_plans(path, [first], COSTS)
    save_plans(path, [second], [more])
    assert load_plans(path) == ([first, second], [*COSTS, more])
    better = SpeculationPlan("ngram", 1, "0", device_kind())
    save_plans(path, [better], COSTS)
    assert load_plans(path)[0] == [better, second]
    path.write_text("{")
    save_plans(path, [first], COSTS)
    assert load_plans(path) == ([first], COSTS)
    assert list(tmp_path.iterdir()) == [path]
