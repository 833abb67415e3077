"""What the closing tag attends to: the attention from the end of the thinking to each of its sentences (TRAAC, arXiv
2510.01581)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from reasonscope.analysis.attention.blocks import read_attention
from reasonscope.analysis.attention.rows.functionals import RowMeans
from reasonscope.analysis.attention.rows.served import ServedModel
from reasonscope.analysis.attention.sentence_attention import ReadSentences
from reasonscope.analysis.attention.vertical import nan_mean
from reasonscope.analysis.results import Axis, Band, Result, undefined
from reasonscope.data.sentence_cut import cut_provenance
from reasonscope.data.trace import Sentence, Trace
from reasonscope.probes.models.model import Model


def close_attention(model: Model | ServedModel, trace: Trace, sentences: Sequence[Sentence] | None = None) -> Result:
    """Mean attention of the close window's tokens on the tokens of each sentence of the thinking: axis (sentence,),
    shares of attention.

    Mean over layers, heads, the window's tokens and the sentence's tokens (arXiv 2510.01581, section 3: a step matters
    as much as the closing tag attends to it). Null: a head that attends equally to all tokens up to its own. `arrays`:
    `heads` (layer, head, sentence); `tokens` (token,) of the thinking, from `numbers["thinking"]` on. Undefined, with
    the reason, for thinking that is not closed or has no sentences. Raises InputError, ContextError.

    Departures: the whole close window attends, not its tag alone, because the tag is often the end of a token that
    began before it.
    """
    common: dict[str, Any] = {"method": "close_attention", "quantity": "attention of the close window", "unit": "1"}
    provenance = {"trace": trace.id}
    if trace.state != "closed":
        return undefined(**common, reason=f"{trace.state} thinking has no end to look back from", provenance=provenance)
    known, rows = ReadSentences.of(trace, sentences), trace.tokens.close_window
    provenance |= cut_provenance(known.sentences)
    if not known.places:
        return undefined(**common, reason="no sentence in the thinking", provenance=provenance)
    reader = RowMeans(rows, model.n_layers, model.n_heads)
    read_attention(model, trace.token_ids[: rows.stop].tolist(), reader)
    looked = reader.result()
    heads = known.spread(np.stack([looked[..., span.slice].mean(axis=-1) for span in known.spans], axis=-1))
    values = nan_mean(heads.reshape(-1, heads.shape[-1]), axis=0)  # over the heads that there are
    alike = float((1 / (np.arange(rows.start, rows.stop) + 1)).mean())
    return Result(
        **common,
        axes=(Axis.of("sentence", len(values)),),
        values=values,
        null=Band.of(alike, alike, values.shape, "a head that attends equally to all tokens up to its own"),
        reason="a sentence without tokens of its own has no attention" if np.isnan(values).any() else "",
        arrays={
            "heads": heads,
            "tokens": trace.only_thinking(nan_mean(looked.reshape(-1, looked.shape[-1]), axis=0)),
        },
        numbers={
            "thinking": [trace.tokens.thinking.start, trace.tokens.thinking.stop],
            "texts": [sentence.text for sentence in known.sentences],
        },
        provenance=provenance,
    )
