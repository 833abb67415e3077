"""What `record` says of problems that a chat model would misread."""

import json

import pytest
from typer.testing import CliRunner

from reasonscope.app import cli


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
