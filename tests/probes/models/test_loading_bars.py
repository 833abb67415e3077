"""Loading a model is quiet where standard error is not a terminal, and leaves the bars of transformers as they were."""

import pytest
from transformers.utils import logging

from reasonscope.probes.models import loading


@pytest.fixture(autouse=True)
def no_word_from_the_environment(monkeypatch):
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)


def seen_inside(monkeypatch, *, terminal):
    """Whether the bars of transformers are on while a model loads, and its work."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    with loading._shown("tiny"):
        return logging.is_progress_bar_enabled()


def test_bars_are_off_in_a_file_and_on_again_afterwards(monkeypatch, heard):
    assert logging.is_progress_bar_enabled()
    assert not seen_inside(monkeypatch, terminal=False)
    assert logging.is_progress_bar_enabled()
    assert [(work.what, work.shown_elsewhere) for work in heard] == [("loading tiny", False)]


def test_a_terminal_shows_the_bars_of_transformers(monkeypatch, heard):
    assert seen_inside(monkeypatch, terminal=True)
    assert [work.shown_elsewhere for work in heard] == [True]


def test_bars_that_the_user_turned_off_stay_off(monkeypatch):
    logging.disable_progress_bar()
    try:
        assert not seen_inside(monkeypatch, terminal=False)
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()


def test_the_environment_has_the_last_word(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    assert seen_inside(monkeypatch, terminal=False)


def test_a_real_model_loads_without_a_bar(capfd):
    loading.load_pretrained("organism", device="cpu", dtype=None, revision=None)
    assert capfd.readouterr() == ("", "")
