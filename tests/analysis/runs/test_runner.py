"""An analysis that was stopped is resumed after the finished traces, and starts again if what they depend on has changed."""

import shutil
from dataclasses import replace
from functools import partial

import pytest

from reasonscope.analysis.results import Result, result_path
from reasonscope.analysis.runs.per_trace import PerTraceAnalysis
from reasonscope.analysis.runs.registry import ANALYSES
from reasonscope.analysis.runs.runner import AnalysisTask, run_analysis
from reasonscope.analysis.tokens.entropy import entropy_of_trace
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.storage.run_folder import run_folder
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Sampling
from reasonscope.probes.generation.cluster import Cluster
from reasonscope.probes.generation.recording import record
from reasonscope.probes.models.model import load_model


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded") / "store"
    how = {"sampling": Sampling(temperature=0, max_new_tokens=12)}
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
        yield entropy_of_trace(trace).with_provenance(seed=study.options.seed)

    stopping = PerTraceAnalysis(per_trace=each, depends_on=lambda study, trace: [tmp_path / "read"])
    monkeypatch.setitem(ANALYSES, "confidence", replace(ANALYSES["confidence"], run=stopping))

    def run(stop_at=99, **options):
        done.clear()
        stop[0] = stop_at
        try:
            found = list(run_analysis(AnalysisTask.of(tmp_path, "confidence", **options)))
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


def test_finished_traces_depend_on_options_files_and_their_results(analysed, recorded, tmp_path):
    ids = list(TraceStore.open(recorded).ids)
    analysed(stop_at=2)
    assert analysed(stop_at=2, seed=1)[0] == ids[:2]  # which replaced the results of seed 0
    assert analysed()[0] == ids
    analysed(stop_at=2)
    (tmp_path / "read").write_text("another")
    assert analysed()[0] == ids
    analysed(stop_at=2)
    path = result_path(run_folder(tmp_path).analyses, "entropy", ids[0])
    Result.load(path).with_numbers(other=1).save(path)
    assert analysed(server_timeout=9.0)[0] == [ids[0], ids[2]]  # how long a server may take changes nothing


@pytest.fixture(scope="module")
def by_one_process(tmp_path_factory):
    """What one process makes of three longer traces, for the analyses of several stages and for one that looks at all of them together."""
    folder = tmp_path_factory.mktemp("alone")
    how = {"sampling": Sampling(temperature=0, max_new_tokens=200)}
    record(load_model("organism"), load_problems("ledger", n=3), folder / "store", **how).close()
    return folder, {name: list(run_analysis(AnalysisTask.of(folder, name))) for name in STAGED}


STAGED = ("receivers", "mi_compare", "emergent_heads")


def test_stages_come_one_after_another(by_one_process):
    folder, found = by_one_process
    ids = list(TraceStore.open(folder / "store").ids)
    told = [(result.method, result.provenance.get("trace", "all")) for result in found["receivers"]]
    trace_by_trace = [[(method, id) for id in ids] for method in ("head_kurtosis", "receiver_scores")]
    assert told == [*trace_by_trace[0], ("receivers", "all"), *trace_by_trace[1]]
    study = AnalysisTask.of(folder, "receivers").study()
    assert [result.method for result in ANALYSES["receivers"](study)] == [method for method, _ in told]
    assert not (folder / "unfinished").exists()


def test_a_killed_second_stage_does_not_repeat_the_first(recorded, tmp_path, monkeypatch):
    shutil.copytree(recorded, tmp_path / "store")
    done, last = [], [4]

    def each(stage, study, trace):
        if len(done) == last[0]:
            raise Stopped
        done.append((stage, trace.id))
        yield replace(entropy_of_trace(trace), method=stage)

    def over(study, results):
        yield replace(results[0], method="over").with_provenance(trace="all")

    second = PerTraceAnalysis(per_trace=partial(each, "second"))
    analysis = PerTraceAnalysis(
        per_trace=partial(each, "first"),
        aggregate=over,
        next_stage=lambda found: second if found[0].method == "over" else None,
    )
    monkeypatch.setitem(ANALYSES, "entropy", replace(ANALYSES["entropy"], run=analysis))
    task, ids = AnalysisTask.of(tmp_path, "entropy"), list(TraceStore.open(recorded).ids)
    with pytest.raises(Stopped):
        list(run_analysis(task))
    last[0] = 99
    list(run_analysis(task))
    assert done == [(stage, id) for stage in ("first", "second") for id in ids]
    assert not (tmp_path / "unfinished").exists()


@pytest.mark.filterwarnings("default")  # Ray leaves sockets and files open, and warns of options of its own
def test_workers_make_what_one_process_makes(by_one_process, tmp_path):
    ray = pytest.importorskip("ray")
    alone, found = by_one_process
    shutil.copytree(alone / "store", tmp_path / "store")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        for name in ("receivers", "emergent_heads"):  # of two stages; of all traces together
            shared = run_analysis(AnalysisTask.of(tmp_path, name), cluster=Cluster(workers=2))
            assert [result.method for result in shared] == [result.method for result in found[name]]
    finally:
        ray.shutdown()
    written, there = (run_folder(run).analyses for run in (tmp_path, alone))
    files = {path.relative_to(written) for path in written.rglob("*.safetensors")}
    assert {path.parts[0] for path in files} == {"head_kurtosis", "receivers", "receiver_scores", "emergent_heads"}
    assert all((written / path).read_bytes() == (there / path).read_bytes() for path in files)
    assert not (tmp_path / "unfinished").exists()
