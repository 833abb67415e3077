"""What the example run holds says over which sentences it was measured, and they are those that the trace has today."""

import pytest

from reasonscope.analysis.results import load_results
from reasonscope.app.demo.bundled import EXAMPLE
from reasonscope.data.sentence_cut import cut_trace
from reasonscope.data.storage.store import TraceStore

OVER_SENTENCES = {
    "agreement",
    "anchors",
    "attention_map",
    "close_attention",
    "receiver_scores",
    "replacement",
    "suppression",
}


@pytest.mark.parametrize("method", sorted(OVER_SENTENCES))
def test_results_over_sentences_are_over_those_of_the_trace(method):
    store, results = TraceStore.open(EXAMPLE / "store"), list(load_results(EXAMPLE / "results", method))
    assert results
    for result in results:
        cut = cut_trace(store.trace(result.provenance["trace"]))
        assert result.provenance["cut"] == cut.cut_hash
        if result.axes[-1].name in ("sentence", "source"):
            assert len(result.axes[-1]) == len(cut.sentences)
