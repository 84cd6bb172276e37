"""Meshes of devices, partitioning, several processes, and preemption."""
