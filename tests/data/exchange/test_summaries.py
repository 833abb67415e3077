"""What `reasonscope check` says about the thinking of a run."""

from reasonscope.data.exchange.summaries import check_summary
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.text.parse import trace_from_text
from reasonscope.data.text.thinking import Thinking
from reasonscope.data.trace import Problem


def checked(path, completions, thinking):
    traces = [
        trace_from_text(
            id=f"p{i}/0", problem=Problem(id=f"p{i}", prompt="q"), prompt="q ", completion=text, thinking=thinking
        )
        for i, text in enumerate(completions)
    ]
    meta = {"thinking": thinking.to_dict()} if thinking else {}
    with TraceStore.create(path, meta=meta, sites=[]) as store:
        store.append(traces, {})
    found = check_summary("run", TraceStore.open(path))
    return dict(found.rows)["thinking"], list(found.notes)


def test_reasoning_in_the_open_says_which_rules_found_the_answer(tmp_path):
    texts = ["Two. The answer is 2.", "One. The answer is 1.", "Three. So 3 of them."]
    told, notes = checked(tmp_path / "run", texts, Thinking(mode="completion"))
    assert told == "in the open; the answer was found by statement (2), last number (1)" and not notes


def test_doubts_and_several_blocks_are_counted(tmp_path):
    texts = ["<think>a</think>\nb\n<think>c</think>\nd", "<think>Say `</think>`.</think>d", "<think>a</think>b"]
    told, notes = checked(tmp_path / "run", texts, None)
    assert told == "between think tags"
    assert notes == [
        "Thinking in several blocks, which are counted together: 1 of the traces.",
        "Doubtful in 1 trace: a tag in quotes or code counts as words.",
    ]
