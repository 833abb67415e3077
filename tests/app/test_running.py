"""An analysis that was stopped goes on behind the traces that are finished, and begins again where what they hang on has changed."""

import shutil

import pytest

from reasonscope.analysis.entropy import entropy_of_trace
from reasonscope.analysis.results import Result, result_path
from reasonscope.app import running
from reasonscope.app.by_trace import ByTrace
from reasonscope.app.places import places
from reasonscope.app.running import Task, run_analysis
from reasonscope.app.study import Options
from reasonscope.data.errors import InputError
from reasonscope.data.problems import load_problems
from reasonscope.data.store import TraceStore
from reasonscope.data.trace import Sampling
from reasonscope.probes.cluster import Cluster
from reasonscope.probes.model import load_model
from reasonscope.probes.record import record


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded") / "store"
    how = {"sampling": Sampling(temperature=0, max_new_tokens=12), "progress": False}
    record(load_model("organism"), load_problems("ledger", n=3), folder, **how).close()
    return folder


class Stopped(Exception):
    pass


@pytest.fixture
def analysed(recorded, tmp_path, monkeypatch):
    """Analyses a run of three traces; gives the ids that were analysed, up to `stop` of them, then Stopped."""
    shutil.copytree(recorded, tmp_path / "store")
    done, stop = [], [99]

    def each(study, trace):
        if len(done) == stop[0]:
            raise Stopped
        done.append(trace.id)
        yield entropy_of_trace(trace, seed=study.options.seed)

    monkeypatch.setitem(running.ANALYSES, "entropy", ByTrace(each=each, reads=lambda study, trace: [tmp_path / "read"]))

    def run(stop_at=99, **options):
        done.clear()
        stop[0] = stop_at
        try:
            found = list(run_analysis(Task(run=tmp_path, name="entropy", options=Options(**options))))
        except Stopped:
            return list(done), None
        return list(done), [result.provenance["trace"] for result in found]

    return run


def test_what_is_finished_is_not_done_again(analysed, recorded, tmp_path):
    ids = list(TraceStore.open(recorded).ids)
    assert analysed(stop_at=2) == (ids[:2], None)
    assert len(list((tmp_path / "unfinished").rglob("*.json"))) == 2
    assert analysed() == (ids[2:], ids)
    assert not (tmp_path / "unfinished").exists()
    assert analysed() == (ids, ids)  # a finished analysis that is asked for again is done again


def test_finished_traces_hang_on_options_files_and_their_results(analysed, recorded, tmp_path):
    ids = list(TraceStore.open(recorded).ids)
    analysed(stop_at=2)
    assert analysed(stop_at=2, seed=1)[0] == ids[:2]  # which replaced the results of seed 0
    assert analysed()[0] == ids
    analysed(stop_at=2)
    (tmp_path / "read").write_text("another")
    assert analysed()[0] == ids
    analysed(stop_at=2)
    path = result_path(places(tmp_path).analyses, "entropy", ids[0])
    Result.load(path).with_numbers(other=1).save(path)
    assert analysed(server_timeout=9.0)[0] == [ids[0], ids[2]]  # how long a server may take changes nothing


def test_an_analysis_of_all_traces_is_not_shared_out(recorded):
    with pytest.raises(InputError, match="`analyse receivers` looks at all traces together"):
        list(run_analysis(Task(run=recorded, name="receivers", options=Options()), cluster=Cluster()))
