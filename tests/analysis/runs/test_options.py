"""Options of analyses: each analysis takes its own, checks them, and says which of them its results depend on."""

import pytest

from reasonscope.analysis.runs.options import LoadsModel, Writes, make_options
from reasonscope.analysis.runs.questions import QUESTIONS, analyses
from reasonscope.analysis.runs.registry import ANALYSES
from reasonscope.analysis.runs.runner import AnalysisTask, analyse
from reasonscope.app.server.main import _VIEWS
from reasonscope.data.errors import InputError
from reasonscope.data.storage.run_folder import run_folder


def options(name, **given):
    return make_options(QUESTIONS[name].options, given)


def test_every_question_has_an_answer_and_a_page():
    assert list(ANALYSES) == list(QUESTIONS) == list(analyses())
    pages = {address for address, *_ in _VIEWS}
    assert {question.page for question in QUESTIONS.values()} <= pages
    methods = [method for question in QUESTIONS.values() for method in question.writes]
    assert len(methods) == len(set(methods))  # no two analyses write the same result


def test_an_analysis_takes_no_option_of_another(tmp_path):
    with pytest.raises(InputError, match="does not take 'block'; it takes deterministic, device"):
        analyse("entropy", tmp_path, block=3)
    with pytest.raises(InputError, match="unknown analysis 'entropi'; choose one of mi, anchors"):
        analyse("entropi", tmp_path)


def test_values_are_checked_as_on_the_command_line():
    with pytest.raises(InputError, match="samples = 0: it must be at least 1"):
        options("confidence", samples=0)
    with pytest.raises(InputError, match=r"share = 2: it must be at least 0\.001 and at most 1"):
        options("cliff", share=2)
    with pytest.raises(InputError, match="region = 'answer': choose thinking or generated"):
        options("mi", region="answer")


def test_a_path_may_be_a_text_and_the_run_gives_the_default(tmp_path):
    where = run_folder(tmp_path)
    assert options("cliff").for_run(where).probe == where.probes / "refusal.safetensors"
    assert options("cliff", probe="p").for_run(where).probe.name == "p"
    assert options("steering_shift").for_run(where).vector == where.vectors / "seal.recipe.safetensors"
    assert AnalysisTask.of(tmp_path, "cliff", traces=["a"]).traces == ("a",)


def test_results_depend_on_whether_a_server_writes_but_not_on_which():
    alone, one, other = (
        options("anchors", **given).key()
        for given in ({}, {"server": "http://a"}, {"server": "http://b", "server_timeout": 9.0})
    )
    assert alone != one == other
    assert options("anchors", rollouts=3).key() != alone


def test_only_what_loads_a_model_has_options_of_models():
    assert not QUESTIONS["trajectory"].needs_model and "device" not in options("trajectory").key()
    assert all(isinstance(options(name), LoadsModel) for name, q in QUESTIONS.items() if q.needs_model)
    assert issubclass(QUESTIONS["confidence"].options, Writes)
