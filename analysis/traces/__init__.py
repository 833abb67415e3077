"""Whole traces: trajectories, reflection, selection of steps, and agreement between signals."""
