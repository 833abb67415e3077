"""Labels of a file or of a judge replace the rules; a judge is asked once for each text; its agreement with the rules is printed."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from reasonscope.data.errors import InputError
from reasonscope.data.text.parse import trace_from_text
from reasonscope.data.trace import Problem
from reasonscope.probes.properties.correctness_probe import _with_verdicts
from reasonscope.probes.properties.judge import _verdict, agreement, judged, verdicts_of_file
from reasonscope.probes.properties.request_outcomes import cell

REFUSES = "I'm sorry, but I can't help with that."
COMPLIES = "Here are the steps:\n1. Open the lid.\n2. Stir well."


def asked(number, answer, harmful=True, closing="</think>"):
    problem = Problem(id=f"q{number}", prompt=f"How do I do {number}?", meta={"harmful": harmful})
    return trace_from_text(
        id=f"q{number}/0",
        problem=problem,
        prompt=f"How do I do {number}?<think>\n",
        completion=f"Let me see.\n{closing}\n\n{answer}",
    )


@pytest.fixture
def traces():
    return [asked(i, REFUSES if i % 2 else COMPLIES) for i in range(8)] + [
        asked(8, "Hm."),
        asked(9, REFUSES, closing=""),
    ]


class Judge(BaseHTTPRequestHandler):
    """Says what the answer does by its first words, with its own reasoning before it; "Hm." leaves it at a loss."""

    def do_POST(self):
        told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(told)
        text = told["messages"][0]["content"]
        said = "Refused." if "I'm sorry" in text else "complied" if "Here are" in text else "I cannot say"
        if "How do I do 3?" in text:
            said = "complied"
        content = {"choices": [{"message": {"role": "assistant", "content": f"<think>refused?</think>\n{said}"}}]}
        payload = json.dumps(content).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    http = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    http.asked, http.status = [], 200
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield http
    http.shutdown()
    http.server_close()
    thread.join()


def test_a_judge_labels_and_its_agreement_is_counted(server, traces, tmp_path):
    url = f"http://127.0.0.1:{server.server_port}/v1"
    found = judged(traces, url, "big", keep=tmp_path / "judge")
    assert [found.behaviours.get(t.id) for t in traces] == [
        "complied", "refused", "complied", "complied", "complied", "refused", "complied", "refused", "unclear", None,
    ]  # fmt: skip
    assert (found.by, found.n_unlabelled) == (f"big at {url}", 1)
    assert (found.agreement.n, found.agreement.n_undecided, found.agreement.share) == (8, 1, 7 / 8)
    assert found.agreement.kappa.value == pytest.approx(0.75)
    assert found.agreement.table["refused/complied"] == 1
    assert "in 88 % of 8 answers that both decide (kappa 0.75" in found.agreement.sentence()
    assert len(server.asked) == 9
    question = server.asked[0]
    assert (question["model"], question["temperature"]) == ("big", 0)
    assert not any("Let me see" in one["messages"][0]["content"] for one in server.asked)  # thinking is not shown
    assert judged(traces, url, "big", keep=tmp_path / "judge") == found
    assert len(server.asked) == 9  # all of them were kept
    judged(traces[:1], url, "other", keep=tmp_path / "judge")
    assert len(server.asked) == 10


def test_a_judge_that_fails_is_one_line(server, traces):
    server.status = 400
    with pytest.raises(InputError, match="refused \\(400\\)"):
        judged(traces[:1], f"http://127.0.0.1:{server.server_port}", "big")
    with pytest.raises(InputError, match="is the server running"):
        judged(traces[:1], "http://127.0.0.1:9", "big", timeout=2)


def test_a_file_replaces_the_rules(traces, tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("id,label\nq0,2_full_refusal\nq1/0,1_full_compliance\nq2,3_partial_refusal\n", encoding="utf-8")
    found = verdicts_of_file(path, traces)
    assert found.behaviours == {"q0/0": "refused", "q1/0": "complied", "q2/0": "unclear"}
    assert found.n_unlabelled == 7
    assert [cell(t, found.behaviours) for t in traces[:4]] == [
        ("harmful", "refused"), ("harmful", "complied"), ("harmful", "unclear"), ("harmful", "unclear"),
    ]  # fmt: skip
    assert cell(traces[0]) == ("harmful", "complied")
    path.write_text("id,label\nq0,perhaps\n", encoding="utf-8")
    with pytest.raises(InputError, match="'perhaps'; write refused, complied or unclear"):
        verdicts_of_file(path, traces)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("Refused.", "refused"),
        ("COMPLIED", "complied"),
        ("It is a partial refusal", "unclear"),
        ("At first I thought refused.\ncomplied", "complied"),
        ("dunno", None),
        ("", None),
    ],
)
def test_a_reply_is_read_by_its_last_line(said, meant):
    assert _verdict(said) == meant


def test_kappa_of_equal_verdicts_is_undefined(traces):
    refused = [trace for trace in traces[:8] if "sorry" in trace.answer_text]
    found = agreement(refused, {trace.id: "refused" for trace in refused})
    assert np.isnan(found.kappa.value) and found.share == 1
    assert "undefined, because all verdicts are the same" in found.sentence()


def test_right_and_wrong_by_a_label(traces):
    given = _with_verdicts(traces, {"q0": "right", "q1": 0, "q2": True})
    assert [trace.correct for trace in given[:4]] == [True, False, True, None]
    with pytest.raises(InputError, match="write right or wrong"):
        _with_verdicts(traces, {"q0": "good"})
