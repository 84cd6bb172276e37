"""Kernels on a mesh of devices."""

import pytest
from support.cells import cells
from support.processes import printed


@pytest.mark.parametrize("rows", cells(["packed"], ["whole"]))
def test_values_and_gradients_are_those_of_one_device(rows):
    """Rows along two axes, heads along a third; nothing is gathered."""
    differences = [float(line) for line in printed("on_a_mesh.py", rows, devices=8)]
    assert len(differences) == {"packed": 3, "whole": 2}[rows]
    assert max(differences) < 2e-6
