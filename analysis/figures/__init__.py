"""Every figure of the toolkit, the same in reports, notebooks and the app; the only package that imports Plotly."""

from reasonscope.analysis.figures.anchors import AnchorGraph, anchor_graph
from reasonscope.analysis.figures.exits import exit_frontier
from reasonscope.analysis.figures.files import figure_data, in_theme, read_figure, to_html, write_figure
from reasonscope.analysis.figures.maps import head_grid, sentence_map, square_map, value_maps
from reasonscope.analysis.figures.probes import (
    cliff_distribution,
    layer_position_map,
    length_prediction,
    length_scores,
    mean_trajectories,
    probe_scores,
    reliability_curve,
    remaining_prediction,
)
from reasonscope.analysis.figures.results import along, arm_outcomes, of_result, points
from reasonscope.analysis.figures.steering import dose_curves, steering_front, steering_plane, sweep_figures
from reasonscope.analysis.figures.theme import BLUE, GREEN, GREY, ORANGE, PURPLE, Figure
from reasonscope.analysis.figures.traces import (
    accuracy_by_difficulty,
    answers_by_request,
    lengths_of_pairs,
    thinking_by_difficulty,
)

__all__ = [
    "BLUE", "GREEN", "GREY", "ORANGE", "PURPLE", "AnchorGraph", "Figure", "accuracy_by_difficulty", "along", "anchor_graph",
    "answers_by_request", "arm_outcomes", "cliff_distribution", "dose_curves", "exit_frontier", "figure_data", "head_grid", "in_theme",
    "layer_position_map", "length_prediction", "length_scores", "lengths_of_pairs", "mean_trajectories", "of_result", "points",
    "probe_scores", "read_figure", "reliability_curve", "remaining_prediction", "sentence_map", "square_map", "steering_front",
    "steering_plane",
    "sweep_figures", "thinking_by_difficulty", "to_html", "value_maps", "write_figure",
]  # fmt: skip
