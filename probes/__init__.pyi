from .architecture.heads import Head as Head
from .architecture.layout import LAYOUTS as LAYOUTS, Layout as Layout
from .architecture.sites import POINTS as POINTS, Site as Site, expand_sites as expand_sites
from .backends.base import Edit as Edit, Forward as Forward, Positions as Positions, gradients as gradients
from .checks.verification import Check as Check, verify as verify
from .evaluation.grouped_folds import cluster_bootstrap as cluster_bootstrap, grouped_predictions as grouped_predictions
from .fitting.linear_probes import LinearProbe as LinearProbe, LogisticProbe as LogisticProbe, RidgeProbe as RidgeProbe
from .generation.activations import Capture as Capture, capture as capture, replay as replay, run_with_cache as run_with_cache
from .generation.decoding import Completion as Completion, DecodingStep as DecodingStep, generate as generate
from .generation.recording import record as record
from .generation.rollout import continuations as continuations, rollouts as rollouts
from .models.model import Model as Model, load_model as load_model
from .properties.correctness_probe import CorrectnessReport as CorrectnessReport, correctness as correctness
from .properties.length_probe import LengthReport as LengthReport, length as length
from .properties.refusal_probe import RefusalReport as RefusalReport, refusal as refusal
from .properties.remaining_probe import RemainingReport as RemainingReport, remaining as remaining
