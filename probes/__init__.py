"""What reads a model: loading, sites, capture, decoding, recording, and the proof that the numbers are true."""

from reasonscope.data.intervals import Estimate
from reasonscope.probes.backends.base import Edit, Forward, Positions, gradients
from reasonscope.probes.capture import Capture, capture, replay, run_with_cache
from reasonscope.probes.decoding import Completion, DecodingStep, generate
from reasonscope.probes.evaluate import cluster_bootstrap, grouped_predictions
from reasonscope.probes.layout import LAYOUTS, Layout
from reasonscope.probes.length import LengthProbe, length_probe
from reasonscope.probes.model import BACKENDS, Model, load_model
from reasonscope.probes.record import record
from reasonscope.probes.rollout import continuations, rollouts
from reasonscope.probes.sites import POINTS, Site, expand_sites
from reasonscope.probes.verify import Check, verify

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
    "LengthProbe",
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
