"""Threads follow the size of the work, a count that the user set stays, and what was there before comes back."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from reasonscope.data.errors import InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends import threads
from reasonscope.probes.backends.threads import (
    SETTINGS,
    WORTH_SHARING,
    _pass_products,
    _thread_count,
    available_threads,
    blas_threads_for,
    one_thread_each,
    set_threads,
    threads_for,
)
from reasonscope.probes.fitting import solvers
from reasonscope.probes.fitting.baseline_fits import baseline_predictions
from reasonscope.probes.fitting.linear_probes import LogisticProbe
from reasonscope.probes.generation.decoding import generate
from reasonscope.probes.models.model import load_model

SMALL, LARGE = 1, 10 * WORTH_SHARING


def blas_counts():
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


@pytest.fixture
def two_cores(monkeypatch):
    """A machine of two cores whose user set nothing; the threads of the tests come back afterwards."""
    before = torch.get_num_threads()
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_usual_counts", lambda: frozenset({2}))
    monkeypatch.setattr(threads, "_quota", lambda: 2)
    threads._blas()  # loads the libraries, so that the limit reaches them
    torch.set_num_threads(2)
    with threadpool_limits(2, user_api="blas"):
        yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("rows", "d_model", "count"),
    [
        (1, 128, 1),  # the organism writes
        (64, 128, 1),
        (1, 896, 16),  # a 0.5 B model writes
        (256, 896, 16),  # and reads
        (1, 4096, 16),
    ],
)
def test_small_passes_take_one_thread_and_large_ones_all(rows, d_model, count):
    assert _thread_count(_pass_products(rows, d_model), available=16) == count


def test_more_rows_or_a_wider_model_never_take_fewer_threads():
    counts = [
        [_thread_count(_pass_products(rows, d_model), available=4) for d_model in (64, 128, 512, 2048)]
        for rows in (1, 8, 64, 1024)
    ]
    assert (np.diff(counts, axis=0) >= 0).all() and (np.diff(counts, axis=1) >= 0).all()
    assert _thread_count(LARGE, available=1) == 1


@pytest.mark.usefixtures("two_cores")
def test_threads_follow_the_work_and_come_back():
    with threads_for(SMALL):
        assert torch.get_num_threads() == 1 and available_threads() == 2
        with threads_for(LARGE):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError), threads_for(SMALL), blas_threads_for(SMALL):
        assert torch.get_num_threads() == 1 and blas_counts() == {1}
        _ = 1 / 0
    assert torch.get_num_threads() == 2 and blas_counts() == {2}
    with blas_threads_for(LARGE):
        assert blas_counts() == {2}
    with one_thread_each():
        assert torch.get_num_threads() == 1 and blas_counts() == {1}
    assert torch.get_num_threads() == 2 and blas_counts() == {2}


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_variable_of_the_user_wins(name, monkeypatch):
    monkeypatch.setenv(name, "2")
    with threads_for(SMALL), blas_threads_for(SMALL):
        assert torch.get_num_threads() == 2 and blas_counts() == {2}
    assert available_threads() == 2


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("count", [1, 3])
def test_a_count_that_the_user_gave_to_torch_wins(count):
    torch.set_num_threads(count)
    for products in (SMALL, LARGE):
        with threads_for(products):
            assert torch.get_num_threads() == count
    assert available_threads() == count


@pytest.mark.usefixtures("two_cores")
def test_threads_of_load_model_win_in_the_whole_process(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # so that what is set here is taken back
    load_model("organism", threads=2)
    assert os.environ["OMP_NUM_THREADS"] == "2"
    with threads_for(SMALL):
        assert torch.get_num_threads() == 2
    with pytest.raises(InputError, match="threads is 0; at least 1"):
        set_threads(0)


@pytest.mark.usefixtures("two_cores")
def test_a_container_gets_no_more_threads_than_its_quota(monkeypatch):
    monkeypatch.setattr(threads, "_quota", lambda: 1)
    with threads_for(LARGE), blas_threads_for(LARGE):
        assert torch.get_num_threads() == 1 and blas_counts() == {1}
    assert available_threads() == 1


@pytest.mark.parametrize(
    ("text", "cores"), [("200000 100000\n", 2), ("150000 100000", 2), ("10000 100000", 1), ("max 100000", 2**15)]
)
def test_the_quota_is_that_of_the_control_group(text, cores, tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text(text, encoding="ascii")
    monkeypatch.setattr(threads, "_QUOTA", tmp_path / "cpu.max")
    assert threads._quota.__wrapped__() == cores
    monkeypatch.setattr(threads, "_QUOTA", tmp_path / "none")
    assert threads._quota.__wrapped__() == 2**15


def test_what_torch_starts_with_is_not_taken_for_a_choice_of_the_user():
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    code = "import torch; from reasonscope.probes.backends import threads; print(threads._chosen_by_user(torch.get_num_threads()))"
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("backend", ["hooks", "transformer_lens", "nnsight"])
def test_every_engine_runs_the_organism_with_one_thread(backend):
    if backend != "hooks":
        pytest.importorskip(backend)
    model, seen = load_model("organism", backend=backend), []

    def watch(activation, _):
        seen.append(torch.get_num_threads())
        return activation

    model.backend.forward(torch.tensor([[5, 6, 7]]), mask=None, write={Site("resid_post", 0): watch})
    assert seen == [1]
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_cores")
def test_what_is_computed_between_the_passes_takes_one_thread_too():
    seen = []
    model = load_model("organism")
    prompts = [model.encode_prompt(problem) for problem in load_problems("ledger", n=3)]
    sampling = Sampling(temperature=0.7, max_new_tokens=8, seed=0)

    def written():
        return generate(
            model, prompts, sampling, seeds=[1, 2, 3], on_step=lambda _: seen.append(torch.get_num_threads())
        )

    ours = written()
    assert set(seen) == {1} and torch.get_num_threads() == 2
    torch.set_num_threads(1)  # which the user may have done
    for one, other in zip(ours, written(), strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.logprobs, other.logprobs)


@pytest.mark.usefixtures("two_cores")
def test_small_fits_take_one_thread_each(monkeypatch):
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(40, 6)), np.arange(40) % 2.0
    seen, gram = [], solvers.gram

    def watched(features):
        seen.append((torch.get_num_threads(), *blas_counts()))
        return gram(features)

    monkeypatch.setattr(solvers, "gram", watched)
    LogisticProbe().fit(features, labels)
    assert seen == [(1, 1)]
    assert torch.get_num_threads() == 2 and blas_counts() == {2}
    baseline_predictions(features, labels, [str(row) for row in range(40)], task="binary")
    assert blas_counts() == {2}
