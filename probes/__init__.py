"""What reads a model: loading, sites, capture, decoding, recording, and the proof that the numbers are true."""

from reasonscope.data.intervals import Estimate
from reasonscope.probes.architecture.layout import LAYOUTS, Layout
from reasonscope.probes.architecture.sites import POINTS, Site, expand_sites
from reasonscope.probes.backends.base import Edit, Forward, Positions, gradients
from reasonscope.probes.checks.verification import Check, verify
from reasonscope.probes.evaluation.grouped_folds import cluster_bootstrap, grouped_predictions
from reasonscope.probes.generation.activations import Capture, capture, replay, run_with_cache
from reasonscope.probes.generation.decoding import Completion, DecodingStep, generate
from reasonscope.probes.generation.recording import record
from reasonscope.probes.generation.rollout import continuations, rollouts
from reasonscope.probes.models.model import BACKENDS, Model, load_model
from reasonscope.probes.properties.length import LengthReport, length_probe

__all__ = [
    "BACKENDS",
    "LAYOUTS",
    "POINTS",
    "Capture",
    "Check",
    "Completion",
    "DecodingStep",
    "Edit",
    "Estimate",
    "Forward",
    "Layout",
    "LengthReport",
    "Model",
    "Positions",
    "Site",
    "capture",
    "cluster_bootstrap",
    "continuations",
    "expand_sites",
    "generate",
    "gradients",
    "grouped_predictions",
    "length_probe",
    "load_model",
    "record",
    "replay",
    "rollouts",
    "run_with_cache",
    "verify",
]
