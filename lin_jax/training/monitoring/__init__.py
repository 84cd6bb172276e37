"""Monitoring of a run: metrics, trackers, progress, loss spikes, stalls, profiles, plots."""
