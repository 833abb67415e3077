"""Analyses of whole traces: trajectories, reflection, selection among samples, differences between runs, and
agreement of signals."""
