from . import analysis as analysis, data as data, probes as probes, steering as steering
from .analysis.results import Result as Result
from .analysis.runs.open_run import OpenRun as OpenRun, open_run as open_run
from .analysis.runs.registry import analyses as analyses
from .analysis.runs.runner import analyse as analyse
from .data.errors import ReasonscopeError as ReasonscopeError
from .data.exchange.importers import import_jsonl as import_jsonl
from .data.exchange.problem_sets import load_problems as load_problems
from .data.intervals import Estimate as Estimate
from .data.storage.store import TraceStore as TraceStore
from .data.text.steps_and_sentences import sentences as sentences, steps as steps
from .data.trace import Message as Message, Problem as Problem, Sampling as Sampling, Trace as Trace
from .probes.architecture.heads import Head as Head
from .probes.architecture.sites import Site as Site
from .probes.checks.verification import verify as verify
from .probes.fitting.linear_probes import LinearProbe as LinearProbe
from .probes.generation.activations import capture as capture
from .probes.generation.decoding import generate as generate
from .probes.generation.recording import record as record
from .probes.models.model import Model as Model, load_model as load_model
from .steering.vectors.scope import Scope as Scope
from .steering.vectors.vector import SteeringVector as SteeringVector
