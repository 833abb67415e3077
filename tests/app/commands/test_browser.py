"""The command that starts the browser app: only for this machine by default, on runs below one folder, with clear errors."""

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from reasonscope.app import cli
from reasonscope.app.commands import browser
from reasonscope.app.demo.summary import table
from reasonscope.app.server.access import VARIABLE, Guard
from reasonscope.data.errors import InputError, MissingExtraError, StoreError
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.summary import number_rows

SUMMARY = {
    "traces": {"n": 400, "correct": 201},
    "length_probe": {"spearman": 0.83456, "ci": [0.8, 0.86]},
    "model": "organism",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    TraceStore.create(tmp_path / "runs" / "mine", sites=[]).close()
    return tmp_path / "runs" / "mine"


@pytest.fixture
def started(monkeypatch):
    """What was started, and with which environment; nothing is."""
    calls = []

    def start(arguments, *, env):
        calls.append((arguments, env))
        return subprocess.CompletedProcess(arguments, 3)

    monkeypatch.setattr(browser.subprocess, "run", start)
    return calls


def test_rows_name_every_number():
    assert list(number_rows(SUMMARY)) == [
        ("traces.n", "400"),
        ("traces.correct", "201"),
        ("length_probe.spearman", "0.8346"),
        ("length_probe.ci", "[0.8, 0.86]"),
        ("model", "organism"),
    ]


def test_brackets_and_escapes_in_a_summary_are_text(capsys):
    Console().print(table({"[/bold]": "[/red]", "x": "\x1b[31m"}))
    shown = capsys.readouterr().out
    assert "[/bold]" in shown and "[/red]" in shown and "\\x1b[31m" in shown and "\x1b[31m" not in shown


@pytest.mark.parametrize("form", [[], ["--run"]])
def test_it_serves_this_machine_only(form, run, started):
    assert CliRunner().invoke(cli.app, ["app", *form, str(run), "--port", "8600"]).exit_code == 3
    [(arguments, environment)] = started
    assert arguments[:3] == [sys.executable, "-m", "streamlit"]
    wanted = {"--server.address=127.0.0.1", "--server.port=8600", "--server.enableXsrfProtection=true"}
    assert wanted <= set(arguments)
    assert arguments[-2:] == ["mine", str(run.parent)]
    assert Path(arguments[4]).name == "main.py" and VARIABLE not in environment


def test_without_a_run_the_example_is_shown(started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(cli.app, ["app"]).exit_code == 3
    assert started[0][0][-2:] == ["", str(tmp_path / "runs")]


def test_another_address_asks_for_a_token(run, started):
    done = CliRunner().invoke(cli.app, ["app", str(run), "--host", "0.0.0.0"])
    token = started[0][1][VARIABLE]
    assert len(token) > 16 and f"token={token}" in done.stderr
    done = CliRunner().invoke(cli.app, ["app", str(run), "--host", "0.0.0.0", "--token", "mine & yours"])
    assert started[1][1][VARIABLE] == "mine & yours" and "token=mine+%26+yours" in done.stderr
    assert [Path(arguments[4]).name for arguments, _ in started] == ["guarded.py"] * 2


def test_a_token_that_is_given_is_asked_for_on_this_machine_too(run, started, monkeypatch):
    CliRunner().invoke(cli.app, ["app", str(run), "--token", "mine"])
    monkeypatch.setenv(VARIABLE, "of the environment")
    CliRunner().invoke(cli.app, ["app", str(run)])
    assert [environment[VARIABLE] for _, environment in started] == ["mine", "of the environment"]
    assert [Path(arguments[4]).name for arguments, _ in started] == ["guarded.py"] * 2


def test_no_token_opens_nothing():
    with pytest.raises(InputError, match=VARIABLE):
        Guard(None, "")


def test_a_run_outside_of_the_root_is_refused(run, tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="outside"):
        browser.browse(run, root=tmp_path / "other")
    with pytest.raises(StoreError, match="reasonscope record"):
        browser.browse(tmp_path / "other")


def test_without_streamlit_the_remedy_is_named(run, monkeypatch):
    monkeypatch.setattr(browser, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"reasonscope\[app\]"):
        browser.browse(run)
