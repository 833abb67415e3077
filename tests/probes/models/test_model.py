"""Loading: what a folder has to be, what is refused and in which words; prompts, BOS, think tags, fingerprints."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from reasonscope.data.errors import ArchitectureError, InputError, ModelLoadError, ReasonscopeError
from reasonscope.data.text.think_tags import GEMMA_4, GPT_OSS, THINK, ThinkTags
from reasonscope.data.text.thinking import Thinking
from reasonscope.data.trace import Message, Problem
from reasonscope.probes.architecture.families import tiny_model
from reasonscope.probes.models.fingerprint import _weights_hash
from reasonscope.probes.models.loading import generation_defaults
from reasonscope.probes.models.model import load_model
from reasonscope.probes.models.prompting import PromptOptions
from reasonscope.probes.models.tags import _find_tags, find_thinking, with_tag_open, with_thinking_closed

CHAT = Problem(id="c", messages=(Message(role="user", content="1 + 1"),))
IDS = torch.tensor([[5, 9, 23, 41]])


@pytest.fixture(scope="session")
def saved(tmp_path_factory, hf_of, tokenizer):
    """A folder as Hugging Face writes it."""
    folder = tmp_path_factory.mktemp("model")
    hf_of("qwen2").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it, to be spoilt."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_folder_is_the_model_that_was_saved(saved, model_of):
    loaded, original = load_model(str(saved)), model_of("qwen2")
    assert torch.equal(*(m.backend.forward(IDS, mask=torch.ones_like(IDS)).logits for m in (loaded, original)))
    assert (loaded.n_layers, loaded.n_heads, loaded.d_model, loaded.context_length, loaded.vocabulary) == (
        3,
        4,
        32,
        128,
        96,
    )
    assert loaded.stop_ids == {2} and loaded.tags == THINK and loaded.device.type == "cpu"
    ours, theirs = loaded.fingerprint, original.fingerprint
    assert {k: v for k, v in ours.items() if k != "name"} == {k: v for k, v in theirs.items() if k != "name"}
    assert ours["name"] == str(saved) and ours["dtype"] == "float32" and json.dumps(dict(ours))


def test_the_tokenizer_is_the_one_in_the_file(saved, tokenizer):
    """AutoTokenizer makes a Qwen2 tokenizer of it, which cuts text in other places and normalizes it."""
    text = "x²: a,b  c\n\n</think>e\u0301"
    loaded = load_model(str(saved)).tokenizer
    assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert loaded.encode(text) == tokenizer.encode(text) and loaded.chat_template == tokenizer.chat_template


def test_dtype_is_the_checkpoints_or_what_was_asked(saved):
    half = load_model(str(saved), dtype="bfloat16")
    assert half.hf.dtype == torch.bfloat16 and half.fingerprint["dtype"] == "bfloat16"


def test_weights_hash_sees_one_changed_number():
    hf, other = tiny_model("gpt2"), tiny_model("gpt2")
    assert _weights_hash(hf) == _weights_hash(other)
    with torch.no_grad():
        other.transformer.h[1].mlp.c_fc.weight[3, 4] += 1e-3
    assert _weights_hash(hf) != _weights_hash(other)


def test_a_missing_folder(tmp_path):
    with pytest.raises(
        ModelLoadError, match="is not a folder; give a hub id, a model folder, organism or organism-base"
    ):
        load_model(str(tmp_path / "nowhere"))
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        load_model(str(tmp_path))


def truncated(path):
    path.write_bytes(path.read_bytes()[:1000])


def without_weight(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def only_pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def test_a_model_says_in_its_config_what_is_known_of_it_alone(folder):
    assert load_model(str(folder)).hints == {}
    config = json.loads((folder / "config.json").read_text()) | {"reasonscope": {"fast": "To"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(str(folder)).hints == {"fast": "To"}
    assert load_model("organism").hints == {"fast": "After", "verdict": " this"}


def own_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").write_text("{"), "cannot load"),
        (lambda f: (f / "config.json").write_text("{}"), "cannot load"),
        (lambda f: truncated(f / "model.safetensors"), "cannot load"),
        (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "cannot load"),
        (only_pickled, r"pytorch_model\.bin: such files are pickles, which can run code"),
        (without_weight, r"lacks 1 weights, the first of which is model\.norm\.weight"),
        (own_code, "comes with its own code, .* never run"),
    ],
)
def test_a_spoilt_folder_is_one_clear_line(spoil, message, folder):
    spoil(folder)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_what_cannot_be_loaded(hf_of, tokenizer):
    with pytest.raises(InputError, match="unknown backend 'jax'; choose from hooks, transformer_lens, nnsight"):
        load_model(hf_of("llama"), tokenizer=tokenizer, backend="jax")
    with pytest.raises(InputError, match="a loaded model needs its tokenizer"):
        load_model(hf_of("llama"))
    with pytest.raises(InputError, match="one with offsets"):
        load_model(hf_of("llama"), tokenizer=object())


def test_an_architecture_of_ones_own(tokenizer):
    hf = tiny_model("llama")
    hf.config.model_type = "my_llama"
    found = load_model(hf.train(), tokenizer=tokenizer).layout
    assert (found.model_type, found.of_block[0].o_proj) == ("my_llama", "self_attn.o_proj") and not hf.training
    own = replace(found, model_type="described by hand")
    assert load_model(hf, tokenizer=tokenizer, layout=own).layout is own
    wrong = replace(own, of_block=tuple(replace(block, o_proj="self_attn.q_proj") for block in own.of_block))
    with pytest.raises(ArchitectureError, match="described by hand model does not behave as its layout says"):
        load_model(hf, tokenizer=tokenizer, layout=wrong)


def test_every_error_of_loading_is_ours():
    assert all(issubclass(error, ReasonscopeError) for error in (ModelLoadError, ArchitectureError, InputError))


def test_there_is_one_bos(model_of):
    model = model_of("qwen2")
    texts = {
        "bare": Problem(id="1", prompt="1 + 1"),  # the tokenizer puts one
        "own": Problem(id="2", prompt="<s>1 + 1"),  # the text has one
        "chat": CHAT,  # the template has one
    }
    encoded = {name: model.encode_prompt(problem) for name, problem in texts.items()}
    assert all(ids[0] == 1 and ids.count(1) == 1 for ids in encoded.values())
    assert encoded["bare"] == encoded["own"]


def test_a_tokenizer_without_bos_gets_none(model_of):
    model = model_of("qwen2")
    bare = PreTrainedTokenizerFast(tokenizer_object=model.tokenizer.backend_tokenizer, bos_token=None, eos_token="</s>")
    ids = replace(model, tokenizer=bare).encode_prompt(Problem(id="1", prompt="abc"))
    assert ids == model.encode_text("abc")[1:]


def test_thinking_is_opened_or_switched_off(model_of):
    model = model_of("qwen2")
    decode = model.tokenizer.decode
    assert decode(model.encode_prompt(CHAT)).endswith("1 + 1\n<think>\n")
    assert decode(model.encode_prompt(CHAT, think=False)).endswith("1 + 1\n<think>\n\n</think>\n\n")
    closed = decode(model.encode_prompt(CHAT, open_tag=True))
    assert closed.endswith("<think>\n") and closed.count("<think>") == 1
    silent = replace(model, prompt=PromptOptions(think=False))
    assert decode(silent.encode_prompt(CHAT)).endswith("1 + 1\n<think>\n\n</think>\n\n")
    assert silent.encode_prompt(CHAT, think=True) == model.encode_prompt(CHAT)
    raw = Problem(id="raw", prompt="1 + 1")
    assert silent.encode_prompt(raw) == model.encode_prompt(raw)


def test_a_template_that_closes_thinking_by_a_tag_alone_gets_no_second_block():
    off = "<|Assistant|></think>"
    assert with_thinking_closed(off, THINK) == off
    assert with_tag_open(off, THINK) == "<|Assistant|><think>\n"
    assert with_thinking_closed("<|turn>model\n", GEMMA_4) == "<|turn>model\n<|channel>thought\n<channel|>"


def templated(model, template, **options):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model.tokenizer.backend_tokenizer, bos_token=None, eos_token="</s>", chat_template=template
    )
    prompt = PromptOptions(**options)
    prompt.check(template, "tiny")
    return replace(model, tokenizer=tokenizer, prompt=prompt)


def test_a_system_message_and_arguments_of_the_template(model_of):
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ reasoning_effort }}"
    asked = templated(model_of("qwen2"), template, system="Be brief.\n", template_args={"reasoning_effort": "low"})
    own = Problem(id="1", messages=(Message(role="system", content="Add."), *CHAT.messages))
    assert asked.encode_prompt(CHAT) == asked.encode_text("[system]Be brief.[user]1 + 1low")
    assert asked.encode_prompt(own) == asked.encode_text("[system]Be brief.\n\nAdd.[user]1 + 1low")
    with pytest.raises(InputError, match="raw prompt"):
        asked.encode_prompt(Problem(id="2", prompt="1 + 1"))
    with pytest.raises(InputError, match="does not read budget; it reads reasoning_effort"):
        templated(model_of("qwen2"), template, template_args={"budget": 3})
    assert PromptOptions.of_meta({"prompt": {"think": True, **asked.prompt.to_dict()}}) == PromptOptions(
        system="Be brief.\n", template_args={"reasoning_effort": "low"}
    )


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        ("{% if not enable_thinking %}<think></think>{% endif %}", "<think></think>"),
        ("{% if not thinking %}</think>{% endif %}", "</think>"),
        (
            "{% if thinking_budget is defined and thinking_budget == 0 %}<think>none</think>{% endif %}",
            "<think>none</think>",
        ),
        (
            "{% for m in messages %}{{ m.content }};{% endfor %}{# /no_think #}",
            "/no_think;1 + 1;<think>\n\n</think>\n\n",
        ),
    ],
)
def test_thinking_is_switched_off_as_each_family_does(model_of, template, ends):
    model = templated(model_of("qwen2"), template)
    assert model.encode_prompt(CHAT, think=False) == model.encode_text(ends)


@pytest.mark.parametrize("behind", ["", "<think>\n", "<think>\n\n</think>\n\n"])
def test_whatever_a_template_ends_with(behind):
    """Templates that open no tag, that open it, and that prefill a closed empty block."""
    rendered = f"user: hi\nassistant: {behind}"
    assert with_tag_open(rendered, THINK) == "user: hi\nassistant: <think>\n"
    assert with_thinking_closed(rendered, THINK) == "user: hi\nassistant: <think>\n\n</think>\n\n"


def test_a_tag_in_the_question_does_not_open_thinking():
    assert with_tag_open("what is <think>? ", THINK) == "what is <think>? <think>\n"


def test_prompts_that_cannot_be_made(model_of):
    model = model_of("qwen2")
    with pytest.raises(InputError, match=r"has messages, but the tokenizer .* has no chat template"):
        bare = PreTrainedTokenizerFast(tokenizer_object=model.tokenizer.backend_tokenizer)
        replace(model, tokenizer=bare).encode_prompt(CHAT)
    with pytest.raises(InputError, match="has no think tags"):
        replace(model, thinking=Thinking(mode="completion")).encode_prompt(CHAT, think=False)


@pytest.mark.parametrize(
    ("added", "template", "expected"),
    [
        (["<think>", "</think>"], None, THINK),
        ([], "{{ '<think>' }}{% if '</think>' in content %}", THINK),  # Qwen2.5: tags that are several tokens
        (["<|channel|>", "<|message|>", "<|start|>", "<|end|>"], "{{ 'analysis' }}", GPT_OSS),
        (["[THINK]", "[/THINK]"], None, ThinkTags(open="[THINK]", close="[/THINK]")),
        (["<|channel>", "<channel|>"], "{{ '<|channel>thought' }}{{ '<channel|>' }}", GEMMA_4),
        (["<|channel>", "<channel|>"], None, GEMMA_4),
        (["<seed:think>", "</seed:think>"], None, ThinkTags(open="<seed:think>", close="</seed:think>")),
        (
            ["<|START_THINKING|>", "<|END_THINKING|>"],
            None,
            ThinkTags(open="<|START_THINKING|>", close="<|END_THINKING|>", answer="<|START_RESPONSE|>"),
        ),
        (["<|inner_prefix|>", "<|inner_suffix|>"], None, ThinkTags(open="<|inner_prefix|>", close="<|inner_suffix|>")),
        ([], "<thought> … </thought>", ThinkTags(open="<thought>", close="</thought>")),
        (
            [],
            "{{ 'Here is my thought process:' }}{{ 'Here is my response:' }}",
            ThinkTags(open="Here is my thought process:", close="Here is my response:"),
        ),
        ([], "<think></think><response></response>", ThinkTags(answer="<response>")),
        ([], "{% if '</think>' in content %}", THINK),
        ([], "{{ messages }}", None),
        ([], None, None),
    ],
)
def test_tags_are_found_in_tokenizer_or_template(added, template, expected):
    from tokenizers import Tokenizer, models

    inner = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    inner.add_tokens(added)
    assert _find_tags(PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template)) == expected


def test_a_model_without_tags_thinks_in_the_open_unless_told():
    from tokenizers import Tokenizer, models

    inner = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    bare = PreTrainedTokenizerFast(tokenizer_object=inner, chat_template="{{ messages }}")
    named = Thinking(tags=ThinkTags(open="<a>", close="</a>"))
    assert find_thinking(bare, None, name="m") == Thinking(mode="completion")
    assert find_thinking(bare, named, name="m") == named
    assert find_thinking(bare, Thinking(mode="none"), name="m").mode == "none"
    with pytest.raises(InputError, match="--think-tags OPEN CLOSE"):
        find_thinking(bare, Thinking(mode="tags"), name="m")


def test_sampling_as_the_model_says(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no generation_config\.json"):
        generation_defaults(str(tmp_path))
    told = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}
    (tmp_path / "generation_config.json").write_text(json.dumps(told))
    assert generation_defaults(str(tmp_path)) == {name: value for name, value in told.items() if name != "do_sample"}
    (tmp_path / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.1}))
    assert generation_defaults(str(tmp_path)) == {"temperature": 0.0, "repetition_penalty": 1.1}
