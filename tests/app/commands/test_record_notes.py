"""What `record` says of problems that a chat model would misread, or that are not those of the run."""

import json

import pytest
from typer.testing import CliRunner

from reasonscope.app import cli
from reasonscope.data.errors import StoreError
from reasonscope.data.storage.store import TraceStore
from reasonscope.steering.experiments.held_out import model_of_run


@pytest.mark.parametrize(
    ("line", "told"), [({"prompt": "1 + 1 ="}, True), ({"messages": [{"role": "user", "content": "1 + 1 ="}]}, False)]
)
def test_a_raw_prompt_skips_the_chat_template_and_record_says_so(tmp_path, line, told):
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"id": "a", **line}))
    args = ["record", "--problems", str(problems), "--out", str(tmp_path / "run"), "--max-new-tokens", "2"]
    done = CliRunner().invoke(cli.app, args)
    assert done.exit_code == 0, done.output
    assert ("1 of 1 problems have a raw `prompt`" in done.output) is told


def test_a_line_that_was_edited_is_refused_and_another_file_is_noticed(tmp_path):
    problems = tmp_path / "p.jsonl"
    args = ["record", "--out", str(tmp_path / "run"), "--max-new-tokens", "2", "--sites", "", "--problems"]

    def asked(path, question, gold):
        path.write_text(json.dumps({"messages": [{"role": "user", "content": question}], "answer": gold}))
        return CliRunner().invoke(cli.app, [*args, str(path)])

    assert asked(problems, "1 + 1 =", "3").exit_code == 0
    assert "not asked for" not in asked(problems, "1 + 1 =", "3").output
    edited = asked(problems, "2 + 2 =", "4")
    assert isinstance(edited.exception, StoreError)
    assert "'p-1'" in str(edited.exception) and "(now [('user', '2 + 2 =')])" in str(edited.exception)
    other = asked(tmp_path / "q.jsonl", "2 + 2 =", "4")
    assert other.exit_code == 0 and "1 problem not asked for now, such as 'p-1'" in other.output


@pytest.mark.parametrize("flags", [["--no-think"], ["--open-tag"], ["--no-think", "--open-tag"], []])
def test_the_model_of_a_run_is_loaded_with_the_prompts_that_it_had(tmp_path, flags):
    args = [
        "record",
        "--n",
        "2",
        "--problems",
        "ledger",
        "--model",
        "organism",
        "--out",
        str(tmp_path),
        "--max-new-tokens",
        "1",
        "--sites",
        "",
        *flags,
    ]
    assert CliRunner().invoke(cli.app, args).exit_code == 0
    store = TraceStore.open(tmp_path)
    assert store.meta["prompt"] == {"think": "--no-think" not in flags, "open_tag": "--open-tag" in flags}
    model = model_of_run(store, None)
    assert model.prompt.to_dict().items() <= store.meta["prompt"].items()
    for trace in store:
        assert model.encode_prompt(trace.problem) == trace.token_ids[: trace.n_prompt_tokens].tolist()
