"""Every objective's run, stopped and gone on with, is the run that was never stopped, to the bit."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from support.cells import cells
from support.interrupted import lines_of, stopping_after

from lin_jax.errors import UserError
from lin_jax.models import PathHead
from lin_jax.models.params import params_of
from lin_jax.training import load_heads, load_model, read_base
from lin_jax.training.checkpoint.files import saved_steps
from lin_jax.training.run import train
from lin_jax.training.setup import resolve


# The joint run is stopped once while only its heads learn, and once after that.
@pytest.mark.parametrize(("objective", "stops"), cells([("medusa_joint", [3, 7])], [("path", [5])]))
@pytest.mark.thorough
def test_a_stopped_run_continues_exactly(objective, stops, base_run, tiny_run, tmp_path, monkeypatch):
    whole, broken = (
        tiny_run(tmp_path / name, objective=objective, init_from=str(base_run), steps=9) for name in ("whole", "broken")
    )
    assert train(whole).status == 0
    folder, done = tmp_path / "broken", 0
    for stop in stops:
        with stopping_after(stop - done, monkeypatch):
            assert train(broken, resume=done > 0).status == 143
        done = saved_steps(folder)[-1]
        assert done == stop
    assert train(broken, resume=True).status == 0
    assert lines_of(folder) == lines_of(tmp_path / "whole")
    ours, theirs = (params_of(load_heads(tmp_path / name)) for name in ("broken", "whole"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.fixture(scope="module")
def path_run(base_run, tiny_run):
    folder = base_run.parent / "path"
    train(tiny_run(folder, objective="path", init_from=str(base_run), steps=2))
    return folder


@pytest.mark.thorough
def test_a_path_head_knows_its_base(path_run, base_run):
    model = load_model(base_run)[0]
    head = load_heads(path_run, model=model)
    assert isinstance(head, PathHead)
    assert (head.hidden_size, head.width, head.vocab_size) == (16, 8, 280)
    base = read_base(path_run)
    assert (base.folder, base.step) == (base_run, 12)
    with pytest.raises(UserError, match=r"belong to step 12 of .*base, and this is another model"):
        load_heads(path_run, model=load_model(base_run, 8)[0])
    with pytest.raises(UserError, match=r"holds a path head, not a model; its model is in .*base"):
        load_model(path_run)


def test_a_path_head_has_no_published_form(path_run, base_run, tmp_path):
    from lin_jax.cli.hub.commands import export_run

    with pytest.raises(UserError, match=r"holds a path head, which has no published form; export .*base without it"):
        export_run(str(path_run), str(tmp_path / "out"))


def test_other_sizes_are_another_head(path_run, base_run, tiny_run):
    run = tiny_run(path_run, objective="path", init_from=str(base_run))
    with pytest.raises(UserError, match=r"embedding is float32\[280,8\] there and float32\[280,4\] here"):
        train(replace(run, heads=replace(run.heads, width=4)), resume=True)
    wide = replace(run, heads=replace(run.heads, width=17), output=str(path_run.parent / "wide"))
    with pytest.raises(UserError, match=r"heads\.width 17 does not fit a model of width 16"):
        resolve(wide, resume=False)
