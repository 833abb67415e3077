"""This project with its store: what a pass reads is on disk before the next one begins, and nothing of it is held."""

import tempfile
from pathlib import Path

from reasonscope.data.storage.store import TraceStore
from reasonscope.data.text.parse import build_trace
from reasonscope.data.trace import Problem
from tools import reasonscope_


def load(folder):
    model, kept = reasonscope_.load(folder), tempfile.TemporaryDirectory(dir=folder)
    store = TraceStore.create(Path(kept.name) / "store", sites=list(map(str, reasonscope_.everywhere(model))))
    return model, store, kept


def prefill(state, job):
    model, store, _ = state
    seen = reasonscope_.prefill(model, job)["activations"]
    traces = [trace(model, ids.tolist(), f"{len(store)}/{row}") for row, ids in enumerate(job.ids)]
    store.append(traces, {site: [row.numpy() for row in part] for site, part in zip(store.sites, seen, strict=True)})
    return {"activations": None}


def trace(model, ids, name):
    """The sequence, and one token more, as the last token of a trace is never fed."""
    problem = Problem(id=name, prompt="?")
    return build_trace(
        id=name, problem=problem, token_ids=[*ids, 0], n_prompt_tokens=1, tokenizer=model.tokenizer_backend
    )


WORKLOADS = {"W1": prefill}
