"""What reads a model: loading, sites, capture, decoding, recording, and the proof that the numbers are true."""

from reasonscope.probes.backends.base import Edit, Forward, Positions, gradients
from reasonscope.probes.capture import Capture, capture, replay, run_with_cache
from reasonscope.probes.decoding import Completion, DecodingStep, generate
from reasonscope.probes.layout import LAYOUTS, Layout
from reasonscope.probes.model import BACKENDS, Model, load_model
from reasonscope.probes.record import record
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
    "Forward",
    "Layout",
    "Model",
    "Positions",
    "Site",
    "capture",
    "expand_sites",
    "generate",
    "gradients",
    "load_model",
    "record",
    "replay",
    "run_with_cache",
    "verify",
]
