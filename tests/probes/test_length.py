"""The length probe finds what stands in the activations, reports the baselines, and finds nothing where there is nothing."""

from dataclasses import replace

import numpy as np
import pytest

from reasonscope.data.errors import InputError
from reasonscope.data.organism.corpus import tokenizer_texts
from reasonscope.data.organism.tokenizer import chat, train_tokenizer
from reasonscope.data.parse import build_trace
from reasonscope.data.store import TraceStore
from reasonscope.data.trace import Problem
from reasonscope.probes.length import length_probe


@pytest.fixture(scope="module")
def traces():
    rng = np.random.default_rng(0)
    bpe = train_tokenizer(tokenizer_texts(0, 50))
    made = []
    for i in range(60):
        prompt, completion = chat(
            "What is the balance?" + " It rains." * int(rng.integers(4)), "Wait. " * int(rng.integers(5, 60)), "A"
        )
        given, written = bpe.encode(prompt).ids, bpe.encode(completion).ids
        problem = Problem(id=str(i), prompt=prompt)
        made.append(
            build_trace(
                id=f"{i}/0", problem=problem, token_ids=given + written, n_prompt_tokens=len(given), tokenizer=bpe
            )
        )
    return made


def stored(path, traces, *, informed):
    """A run whose layer 1 knows the length at the last prompt token, or nothing does."""
    rng = np.random.default_rng(1)
    sites = ["resid_post.0", "resid_post.1"]
    arrays = {
        site: [rng.standard_normal((len(t.token_ids) - 1, 8)).astype(np.float32) for t in traces] for site in sites
    }
    if informed:
        for trace, rows in zip(traces, arrays["resid_post.1"], strict=True):
            rows[trace.n_prompt_tokens - 1, 3] = np.log(trace.n_thinking_tokens)
    store = TraceStore.create(path, sites=sites)
    store.append(traces, arrays)
    return store


def test_it_finds_the_layer_that_knows(tmp_path, traces):
    probe = length_probe(stored(tmp_path, traces, informed=True), traces)
    assert probe.spearman.value > 0.9
    assert probe.spearman.low <= probe.spearman.value <= probe.spearman.high
    assert probe.baselines.keys() == {"prompt_length", "bag_of_words"}
    assert all(abs(score.value) < 0.5 for score in probe.baselines.values())
    assert (probe.n_groups, probe.n_truncated) == (60, 0)


def test_it_finds_nothing_where_nothing_is(tmp_path, traces):
    assert abs(length_probe(stored(tmp_path, traces, informed=False), traces).spearman.value) < 0.4


def test_runs_without_residuals_and_traces_without_thinking_are_refused(tmp_path, traces):
    with pytest.raises(InputError, match="no resid_post site"):
        length_probe(TraceStore.create(tmp_path / "a", sites=["z.0"]), traces)
    store = stored(tmp_path / "b", traces, informed=False)
    with pytest.raises(InputError, match="has no thinking"):
        length_probe(store, [replace(traces[0], state="absent")])
