"""Kernels on a mesh of devices."""

from support.processes import printed


def test_values_and_gradients_are_those_of_one_device():
    """Rows along two axes, heads along a third; nothing is gathered."""
    differences = [float(line) for line in printed("on_a_mesh.py", devices=8)]
    assert len(differences) == 5
    assert max(differences) < 2e-6
