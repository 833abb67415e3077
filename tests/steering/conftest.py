"""Fixtures of tests/steering."""

import string

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from reasonscope.data.storage.store import TraceStore
from reasonscope.data.text.parse import trace_from_text


@pytest.fixture(scope="session")
def character_tokenizer():
    """A token a character and one for a blank line, 96 at most as the tiny models have; think tags and a template that opens them."""
    characters = string.ascii_letters + string.digits + "ĠĊ.,?!+-=*/:;<>|()'"
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *characters, "ĊĊ"])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<pad>", "<s>", "</s>"])
    inner.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")])
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<think>\n{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template
    )


@pytest.fixture
def written_store(tmp_path, character_tokenizer):
    """A store of given (problem, sample, thinking, correct answer or not) whose state at a token is [token id, its index, 1, …]."""

    def write(rows, sites=("resid_post.0",), width=4):
        traces = []
        for problem, sample, thinking, answer in rows:
            traces.append(
                trace_from_text(
                    id=f"{problem.id}/{sample}",
                    problem=problem,
                    prompt="q<think>\n",
                    completion=f"{thinking}\n</think>\n\n{answer}" if answer is not None else thinking,
                    tokenizer=character_tokenizer.backend_tokenizer,
                    sample=sample,
                )
            )
        store = TraceStore.create(tmp_path / "store", sites=sites)
        states = []
        for trace in traces:
            state = np.ones((len(trace.token_ids) - 1, width), dtype=np.float32)
            state[:, 0], state[:, 1] = trace.token_ids[:-1], np.arange(len(state))
            states.append(state)
        store.append(traces, dict.fromkeys(sites, states))
        return store

    return write
