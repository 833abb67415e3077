"""What an imported conversation becomes with a model: the prompt of its template, and the tokens that it read."""

import json
import os

import pytest
from transformers import PreTrainedTokenizerFast

from reasonscope.data.errors import InputError
from reasonscope.data.exchange.importers import import_traces
from reasonscope.data.exchange.summaries import import_summary
from reasonscope.data.text.parse import THINK
from reasonscope.data.text.thinking import Thinking
from reasonscope.probes.models.chat_rendering import TemplateRenderer
from reasonscope.probes.models.prompting import Prompting, load_prompting

# The reasoning of earlier turns is left out and that of the last is kept, as in Qwen3; the end of a turn is a token.
QWEN = (
    "{% for m in messages %}|{{ m.role }}|{% if m.role == 'assistant' and loop.last and m.reasoning_content %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls %}(call {{ c.function.name }}){% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}|assistant|{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# As in QwQ: the prompt opens the thinking, and the reasoning of every turn is left out.
QWQ = (
    "{% for m in messages %}|{{ m.role }}|{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}|assistant|<think>\n{% endif %}"
)
IN_TAGS = Thinking(tags=THINK)
USER = {"role": "user", "content": "3 + 4?"}


@pytest.fixture
def renderer_of(hf_of, tokenizer):
    def make(template, thinking=IN_TAGS):
        inner = tokenizer.backend_tokenizer
        own = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", chat_template=template)
        return TemplateRenderer(
            model=Prompting(config=hf_of("qwen3").config, tokenizer=own, thinking=thinking, name="tiny")
        )

    return make


def imported(tmp_path, renderer, row, **how):
    (tmp_path / "dump.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    return import_traces(tmp_path / "dump.jsonl", renderer=renderer, **how).traces


def reply(message, finish="stop", asked=(USER,)):
    choice = {"message": {"role": "assistant", **message}, "finish_reason": finish}
    return {"messages": list(asked), "choices": [choice]}


@pytest.mark.parametrize(
    ("template", "opened"), [(QWEN, "|assistant|<think>\n"), (QWQ, "|assistant|<think>\n")], ids=["qwen", "qwq"]
)
def test_a_reply_is_what_the_model_wrote(template, opened, tmp_path, renderer_of):
    renderer = renderer_of(template)
    (trace,) = imported(tmp_path, renderer, reply({"content": "It is 7.", "reasoning": "So 7."}))
    assert trace.text == f"<s>|user|3 + 4?</s>\n{opened}So 7.\n</think>\n\nIt is 7.</s>"
    assert (trace.thinking, trace.state, trace.final_answer) == ("So 7.", "closed", "7")
    prompt = renderer.model.encode_prompt(trace.problem)
    assert trace.token_ids[: trace.n_prompt_tokens].tolist() == prompt  # what a recording would have sent
    decoded = renderer.tokenizer.decode(trace.token_ids.tolist(), skip_special_tokens=False)
    assert decoded == trace.text and renderer.tokenizer.encode(trace.text, add_special_tokens=False).ids == list(
        trace.token_ids
    )
    assert trace.text[slice(*trace.offsets[trace.tokens.thinking.start])] == "S" and trace.model["name"] == "tiny"


@pytest.mark.parametrize("template", [QWEN, QWQ])
def test_a_reply_that_was_cut_off_is_left_open(template, tmp_path, renderer_of):
    (trace,) = imported(tmp_path, renderer_of(template), reply({"content": None, "reasoning": "So"}, "length"))
    assert trace.text.endswith("|assistant|<think>\nSo") and (trace.thinking, trace.state) == ("So", "truncated")


@pytest.mark.parametrize(
    ("template", "prefilled"), [(QWEN, "<think>\n\n</think>\n\n"), (QWQ, "<think>\n\n</think>\n\n")]
)
def test_a_reply_without_reasoning_had_thinking_off(template, prefilled, tmp_path, renderer_of):
    (trace,) = imported(tmp_path, renderer_of(template), reply({"content": "It is 7."}))
    assert trace.text.endswith(f"|assistant|{prefilled}It is 7.</s>") and trace.state == "empty"
    (inline,) = imported(tmp_path, renderer_of(QWQ), reply({"content": "So 7.</think>It is 7."}))
    assert inline.text.endswith("|assistant|<think>\nSo 7.</think>It is 7.</s>") and inline.thinking == "So 7."


def test_earlier_turns_are_as_the_template_has_them(tmp_path, renderer_of):
    """The reasoning of the first turn was not in the prompt of the second, and a tool call was."""
    called = {"role": "assistant", "content": "", "reasoning": "I call.", "tool_calls": [{"function": {"name": "add"}}]}
    asked = (USER, called, {"role": "tool", "content": "7"})
    row = reply({"content": "It is 7.", "reasoning": "So 7."}, asked=asked)
    first, second = imported(tmp_path, renderer_of(QWEN), row, turn="all")
    assert (
        first.text.endswith("|assistant|<think>\nI call.\n</think>\n\n(call add)</s>") and first.thinking == "I call."
    )
    assert (
        "|assistant|(call add)</s>\n|tool|7</s>\n|assistant|<think>\nSo 7.\n" in second.text
        and "I call." not in second.text
    )


def test_token_ids_of_the_server_are_kept(tmp_path, renderer_of):
    renderer = renderer_of(QWEN)
    prompt = renderer.encode("|user|3 + 4?</s>\n|assistant|")
    written = renderer.tokenizer.encode("<think>\nSo 7.</think>It is 7.</s>", add_special_tokens=False).ids
    row = {
        "request_id": "a",
        "prompt_token_ids": prompt,
        "outputs": [{"text": "It is 7.", "token_ids": written, "finish_reason": "stop"}],
    }
    (trace,) = imported(tmp_path, renderer, row)
    assert trace.token_ids.tolist() == [*prompt, *written] and trace.thinking == "So 7."
    for wrong in ({"token_ids": [10_000]}, {"text": "It is 8."}):
        with pytest.raises(InputError, match="do not spell its text"):
            imported(tmp_path, renderer, {**row, "outputs": [{**row["outputs"][0], **wrong}]})


def test_a_raw_prompt_is_not_rendered_again(tmp_path, renderer_of):
    (trace,) = imported(tmp_path, renderer_of(QWEN), {"prompt": "Q: 3 + 4?<think>", "completion": "So 7.</think>7"})
    assert trace.text == "<s>Q: 3 + 4?<think>So 7.</think>7" and trace.thinking == "So 7."


SPECIAL = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}<s>assistant"


def rollout(prompt):
    return {"input": prompt, "output": "<think>So 7.</think>7", "gts": "7", "score": 1.0}


def test_a_prompt_that_lost_its_special_tokens_gets_them_back(tmp_path, renderer_of):
    renderer = renderer_of(SPECIAL)
    for prompt, whole in (
        ("user\n3 + 4?\nassistant", "<s>user\n3 + 4?</s>\n<s>assistant"),
        (
            "system\nBe brief.\nuser\n3\nuser\n?\nassistant",
            "<s>system\nBe brief.</s>\n<s>user\n3\nuser\n?</s>\n<s>assistant",
        ),
    ):
        (trace,) = imported(tmp_path, renderer, rollout(prompt))
        assert trace.text == whole + "<think>So 7.</think>7" and trace.meta["prompt"] == "restored"
        assert trace.problem.prompt == whole


def test_a_prompt_that_the_template_does_not_write_is_counted(tmp_path, renderer_of):
    (tmp_path / "dump.jsonl").write_text(json.dumps(rollout("human: 3 + 4?")), encoding="utf-8")
    found = import_traces(tmp_path / "dump.jsonl", renderer=renderer_of(SPECIAL))
    assert found.traces[0].meta["prompt"] == "without its special tokens"
    assert "The prompts of 1 of the traces lost their special tokens" in str(import_summary("run", found))


def test_text_that_keeps_its_own_white_space_gets_no_more(tmp_path, renderer_of):
    (trace,) = imported(tmp_path, renderer_of(QWQ), reply({"content": "\n\nIt is 7.", "reasoning": "So 7."}))
    assert trace.text.endswith("So 7.\n</think>\n\nIt is 7.</s>")


def test_a_model_without_tags_reasons_in_the_open_unless_the_dump_has_reasoning(tmp_path, renderer_of):
    renderer = renderer_of(QWEN, Thinking(mode="completion"))
    plain = reply({"content": "3 and 4 make 7. The answer is 7."})
    (trace,) = imported(tmp_path, renderer, plain)
    assert (trace.thinking, trace.final_answer) == ("3 and 4 make 7.", "7")
    for content, reasoning in (("7", "So 7."), ("<think>So 7.</think>7", None)):
        (trace,) = imported(tmp_path, renderer, reply({"content": content, "reasoning": reasoning}))
        assert (trace.thinking, trace.answer_text) == ("So 7.", "7</s>")
    (tmp_path / "dump.jsonl").write_text("\n".join(map(json.dumps, [plain, plain | {"id": "b"}])), encoding="utf-8")
    assert import_traces(tmp_path / "dump.jsonl", renderer=renderer).thinking.mode == "completion"


def test_a_model_without_tags_or_template(tmp_path, renderer_of):
    (trace,) = imported(
        tmp_path, renderer_of(QWEN, Thinking(mode="completion")), reply({"content": "7", "reasoning": "So 7."})
    )
    assert trace.thinking == "So 7."
    with pytest.raises(InputError, match="has no chat template"):
        imported(tmp_path, renderer_of(None), reply({"content": "7"}))
    with pytest.raises(InputError, match=r"the chat template of tiny fails on the dump \(TemplateError: no tools"):
        imported(tmp_path, renderer_of("{{ raise_exception('no tools') }}"), reply({"content": "7"}))


@pytest.mark.skipif(
    "REASONSCOPE_REAL_MODEL" not in os.environ, reason="needs REASONSCOPE_REAL_MODEL, the folder of a model"
)
def test_a_real_tokenizer_reads_what_a_recording_would_have_sent(tmp_path):
    renderer = TemplateRenderer(model=load_prompting(os.environ["REASONSCOPE_REAL_MODEL"]))
    (trace,) = imported(tmp_path, renderer, reply({"content": "It is 7.", "reasoning": "So 7."}))
    assert trace.token_ids[: trace.n_prompt_tokens].tolist() == renderer.model.encode_prompt(trace.problem)
    assert isinstance(renderer.model.tokenizer, PreTrainedTokenizerFast) and trace.thinking == "So 7."
    assert renderer.tokenizer.decode(trace.token_ids.tolist(), skip_special_tokens=False) == trace.text
