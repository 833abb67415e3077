from .errors import ArchitectureError as ArchitectureError, ContextError as ContextError, InputError as InputError, MissingExtraError as MissingExtraError, ModelLoadError as ModelLoadError, ReasonscopeError as ReasonscopeError, SiteError as SiteError, StoreError as StoreError
from .exchange.export import export_jsonl as export_jsonl, export_parquet as export_parquet, export_thought_anchors as export_thought_anchors
from .exchange.importers import import_inspect as import_inspect, import_jsonl as import_jsonl, import_thought_anchors as import_thought_anchors
from .exchange.problem_sets import load_problems as load_problems
from .intervals import Estimate as Estimate
from .sentence_cut import CutTrace as CutTrace, cut_trace as cut_trace
from .storage.run_folder import RunFolder as RunFolder
from .storage.store import TraceStore as TraceStore, check_store as check_store
from .text.answers import equivalent as equivalent, extract_answer as extract_answer
from .text.parse import GPT_OSS as GPT_OSS, THINK as THINK, ThinkTags as ThinkTags, build_trace as build_trace, find_regions as find_regions, trace_from_text as trace_from_text
from .text.sentence_labels import label_sentences as label_sentences
from .text.steps_and_sentences import sentences as sentences, steps as steps
from .trace import Message as Message, Problem as Problem, Regions as Regions, Sampling as Sampling, Sentence as Sentence, Span as Span, Step as Step, Trace as Trace
