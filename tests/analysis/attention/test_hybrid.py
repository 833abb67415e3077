"""Models whose blocks do not all have attention: analyses of heads read those that have, and say which they skip."""

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from reasonscope.analysis.attention.head_profiles import head_table
from reasonscope.analysis.attention.maps import attention_map
from reasonscope.analysis.attention.receiver_heads import head_kurtosis, receivers_of
from reasonscope.analysis.causal.attribution_patching import head_attribution
from reasonscope.analysis.tokens.token_alternatives import head_effects
from reasonscope.data import sentences, trace_from_text
from reasonscope.data.trace import Problem
from reasonscope.probes.architecture.families import VOCAB, tiny_of
from reasonscope.probes.architecture.heads import Head, all_heads, random_heads
from reasonscope.probes.models.model import load_model

SKIPPED = "3 of 4 blocks have no attention and are skipped: 0, 1, 2"


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<pad>", "<s>", "</s>", "<think>", "</think>", "Ġ", "Ċ", *(chr(33 + i) for i in range(VOCAB - 7))]
    inner = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def hybrid(tokenizer):
    return load_model(tiny_of("qwen3_next"), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def thinking_trace(hybrid):
    text = "So 2 + 2 = 4. Wait. No, it is 4. Yes. It is so. Fine."
    trace = trace_from_text(
        id="p/0", problem=Problem(id="p", prompt="2+2"), prompt="2+2\n<think>\n", completion=f"{text}\n</think>\n\n4",
        tokenizer=hybrid.tokenizer_backend,
    )  # fmt: skip
    return trace, sentences(trace)


def test_heads_are_those_of_blocks_with_attention(hybrid):
    assert hybrid.n_heads == 4 and hybrid.layers_with_heads == (3,)
    assert all_heads(hybrid.layout) == [Head(layer=3, index=i) for i in range(4)]
    sets = random_heads([Head(layer=3, index=0)], all_heads(hybrid.layout))
    assert sorted(head.index for (head,) in sets) == [1, 2, 3]


def test_each_analysis_of_heads_says_which_blocks_it_skips(hybrid, thinking_trace):
    trace, sentences = thinking_trace
    for found in (
        head_table(hybrid, trace, sentences),
        attention_map(hybrid, trace, sentences),
        head_effects(hybrid, trace, sentences, n_controls=2),
        head_attribution(hybrid, trace, sentences),
        head_kurtosis(hybrid, trace, sentences=sentences, depth_control=False, proximity=1),
    ):
        heads = found.values.reshape(-1, 4, 4)
        assert found.reason == SKIPPED, found.method
        assert np.isnan(heads[:, :3]).all() and np.isfinite(heads[:, 3]).all(), found.method


def test_receivers_are_chosen_among_the_heads_that_there_are(hybrid, thinking_trace):
    trace, sentences = thinking_trace
    found = receivers_of([head_kurtosis(hybrid, trace, sentences=sentences, depth_control=False, proximity=1)], top=2)
    assert len(found.numbers["heads"]) == 2 and all(head.startswith("3.") for head in found.numbers["heads"])
    assert found.reason == SKIPPED
