"""The browser app: a run's summary and report on one page, and a clear word where there is no run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest
from typer.testing import CliRunner

from reasonscope.app import cli
from reasonscope.app.commands import browser
from reasonscope.app.summary import read_summary, rows
from reasonscope.data.errors import InputError, MissingExtraError

SUMMARY = {
    "traces": {"n": 400, "correct": 201},
    "length_probe": {"spearman": 0.83456, "ci": [0.8, 0.86]},
    "model": "organism",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY), encoding="utf-8")
    return tmp_path


def _page(folder: str) -> None:
    from pathlib import Path

    from reasonscope.app.main import page

    page(Path(folder))


def test_rows_name_every_number(run):
    assert list(rows(read_summary(run))) == [
        ("traces.n", "400"),
        ("traces.correct", "201"),
        ("length_probe.spearman", "0.8346"),
        ("length_probe.ci", "0.8 … 0.86"),
        ("model", "organism"),
    ]


def test_the_page_shows_the_numbers_and_says_that_there_is_no_report(run):
    page = AppTest.from_function(_page, args=(str(run),)).run()
    assert not page.exception
    assert page.table[0].value["value"].tolist()[0] == "400"
    assert "no report" in page.info[0].value


def test_the_page_embeds_the_report(run):
    (run / "report.html").write_text("<p>A figure</p>", encoding="utf-8")
    page = AppTest.from_function(_page, args=(str(run),)).run()
    assert not page.exception
    assert len(page.info) == 0
    assert any("A figure" in str(element.proto) for element in page.main)


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_a_folder_without_a_summary_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "summary.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"summary\.json"):
        read_summary(tmp_path)


def test_the_command_starts_streamlit_for_this_machine_only(run, monkeypatch):
    started = []

    def start(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        started.append(arguments)
        return subprocess.CompletedProcess(arguments, 3)

    monkeypatch.setattr(browser.subprocess, "run", start)
    assert CliRunner().invoke(cli.app, ["app", str(run), "--port", "8600"]).exit_code == 3
    [arguments] = started
    assert arguments[:3] == [sys.executable, "-m", "streamlit"]
    assert {"--server.address=localhost", "--server.port=8600"} <= set(arguments)
    assert arguments[-1] == str(run)


def test_without_streamlit_the_remedy_is_named(run, monkeypatch):
    monkeypatch.setattr(browser, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"reasonscope\[app\]"):
        browser.browse(run)
