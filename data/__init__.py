"""What flows through the toolkit: problems, traces and their pieces, answers, and the store that keeps them with their activations."""

from reasonscope.data.errors import (
    ArchitectureError,
    ContextError,
    InputError,
    MissingExtraError,
    ModelLoadError,
    ReasonscopeError,
    SiteError,
    StoreError,
)
from reasonscope.data.exchange.export import export_jsonl, export_parquet, export_thought_anchors
from reasonscope.data.exchange.importers import (
    import_inspect,
    import_jsonl,
    import_thought_anchors,
    published_sentences,
)
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.organism.problems import ledger_of, ledger_problem, request_of, request_problem
from reasonscope.data.storage.store import TraceStore, check_store
from reasonscope.data.text.align import decode_with_offsets, token_strings, tokens_overlapping, tokens_starting_in
from reasonscope.data.text.answers import equivalent, extract_answer
from reasonscope.data.text.parse import GPT_OSS, THINK, ThinkTags, build_trace, find_regions, trace_from_text
from reasonscope.data.text.sentence_labels import TAGS, label_sentences
from reasonscope.data.text.sentence_splitter import anchor_chunks, split_sentences
from reasonscope.data.text.steps_and_sentences import seal_steps, sentences, sentences_at, separator_token_ids, steps
from reasonscope.data.trace import Message, Problem, Regions, Sampling, Sentence, Span, Step, Trace

__all__ = [
    "GPT_OSS",
    "TAGS",
    "THINK",
    "ArchitectureError",
    "ContextError",
    "InputError",
    "Message",
    "MissingExtraError",
    "ModelLoadError",
    "Problem",
    "ReasonscopeError",
    "Regions",
    "Sampling",
    "Sentence",
    "SiteError",
    "Span",
    "Step",
    "StoreError",
    "ThinkTags",
    "Trace",
    "TraceStore",
    "anchor_chunks",
    "build_trace",
    "check_store",
    "decode_with_offsets",
    "equivalent",
    "export_jsonl",
    "export_parquet",
    "export_thought_anchors",
    "extract_answer",
    "find_regions",
    "import_inspect",
    "import_jsonl",
    "import_thought_anchors",
    "label_sentences",
    "ledger_of",
    "ledger_problem",
    "load_problems",
    "published_sentences",
    "request_of",
    "request_problem",
    "seal_steps",
    "sentences",
    "sentences_at",
    "separator_token_ids",
    "split_sentences",
    "steps",
    "token_strings",
    "tokens_overlapping",
    "tokens_starting_in",
    "trace_from_text",
]
