"""Fixtures of tests/probes: the tiny model of a family, built once a session. Tests must leave it as they found it."""

import string
from collections.abc import Callable, Iterator
from functools import cache

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from reasonscope.probes.architecture.families import FAMILIES, tiny_model
from reasonscope.probes.models.model import Model, load_model

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<think>\n{% endif %}"
)


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every family of the layout table in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def built() -> dict[str, PreTrainedModel]:
    """The tiny models that this session has made so far."""
    return {}


@pytest.fixture(scope="session")
def hf_of(built: dict[str, PreTrainedModel]) -> Callable[[str], PreTrainedModel]:
    """The tiny model of a family by its name."""

    def get(family: str) -> PreTrainedModel:
        if family not in built:
            built[family] = tiny_model(family)
        return built[family]

    return get


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, 96 at most as the tiny models have; think tags; it puts a BOS before what it encodes."""
    return character_tokenizer()


@pytest.fixture(scope="session")
def model_of(hf_of: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Model]:
    """The tiny model of a family, loaded with the hooks backend."""
    return cache(lambda family: load_model(hf_of(family), tokenizer=tokenizer))


@pytest.fixture(autouse=True)
def _no_hook_survives(built: dict[str, PreTrainedModel]) -> Iterator[None]:
    yield
    assert {family: n for family, hf in built.items() if (n := n_hooks(hf))} == {}


def n_hooks(module: nn.Module) -> int:
    """Number of our forward hooks of any kind in a model (transformers leaves some of its own for output_hidden_states)."""
    hooks = (
        hook for m in module.modules() for table in (m._forward_hooks, m._forward_pre_hooks) for hook in table.values()
    )
    return sum(hook.__module__.startswith("reasonscope") for hook in hooks)


def character_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    characters = string.ascii_letters + string.digits + "ĠĊ.,?!+-=*/:;<>|()'"
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *characters])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.add_special_tokens(["<pad>", "<s>", "</s>"])
    inner.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template
    )
