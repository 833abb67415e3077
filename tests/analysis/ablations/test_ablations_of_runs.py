"""A plan on a run keeps every reading, goes on if it was interrupted, and saves results whose controls can be drawn."""

import random
from dataclasses import asdict

import numpy as np
import pytest

from reasonscope.analysis import AblationStudy, ablate, activation_patching, head_plan, named_heads
from reasonscope.analysis.ablations.run import ablate_heads
from reasonscope.analysis.figures.ablations import ablation_figures
from reasonscope.analysis.results import Axis, Band, Result, result_path
from reasonscope.data.errors import InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.organism.problems import ledger_of
from reasonscope.data.organism.tokenizer import chat
from reasonscope.data.organism.writer import write_ledger
from reasonscope.data.storage.run_folder import run_folder
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.text.parse import build_trace
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.heads import Head
from reasonscope.probes.generation.recording import record
from reasonscope.probes.models.model import load_model
from reasonscope.steering import Ablation
from reasonscope.steering.ablation import effects as effects_module
from reasonscope.steering.ablation.effects import _parts_of
from reasonscope.steering.ablation.plan import Patch, Plan, Side, Sweep


@pytest.fixture(scope="module")
def model():
    return load_model("organism")


@pytest.fixture
def run(tmp_path, model):
    """Four ledgers as their grammar writes them, of two difficulties; the last two do not think."""
    rng, traces = random.Random(0), []
    for i, problem in enumerate(load_problems("ledger", n=4)):
        writing = write_ledger(ledger_of(problem), "default", rng)
        prompt, completion = chat(problem.messages[0].content, writing.thinking if i < 2 else "", writing.answer)
        given, written = (model.tokenizer_backend.encode(text).ids for text in (prompt, completion))
        about = {"n_prompt_tokens": len(given), "tokenizer": model.tokenizer_backend, "model": model.fingerprint}
        traces.append(build_trace(id=f"{problem.id}/0", problem=problem, token_ids=given + written, **about))
    meta = {"model": dict(model.fingerprint), "sampling": asdict(Sampling(max_new_tokens=12))}
    with TraceStore.create(tmp_path / "made" / "store", meta=meta) as store:
        store.append(traces, {})
    return tmp_path / "made"


def save_scores(run, method, values, *, trace="all", metrics=None, **numbers):
    values = np.asarray(values, dtype=np.float64)
    axes = (Axis.of("layer", values.shape[-2]), Axis.of("head", values.shape[-1]))
    axes = (Axis.of("metric", metrics), *axes) if metrics else axes
    null = Band.of(0.0, 0.0, values.shape, "none")
    about = {"method": method, "quantity": "q", "unit": "1", "axes": axes, "values": values, "null": null}
    Result(**about, numbers=numbers).save(result_path(run_folder(run).analyses, method, trace))


def test_heads_are_named_after_results(run):
    where, grid = run_folder(run), np.arange(24.0).reshape(6, 4)
    with pytest.raises(InputError, match=r"no result of heads; write it with: reasonscope analyse heads --run"):
        named_heads(where, "from:analyse/heads@top10")
    metrics = ["span", "sink"]
    save_scores(run, "heads", [grid, -grid], trace="a/0", metrics=metrics, local=["0.1", "0.2"], units={})
    save_scores(run, "head_attribution", grid, trace="a/0")
    save_scores(run, "head_attribution", np.where(grid == 5, 100.0, 0.0), trace="b/0")
    save_scores(run, "emergent_heads", -grid)
    save_scores(run, "receivers", grid, heads=["2.3", "1.1"])
    found = {
        name: list(map(str, named_heads(where, name)))
        for name in (
            "from:analyse/heads@top3",  # the mean over both traces: 5 of the second wins
            "from:analyse/head_attribution@bottom1",
            "from:analyse/heads.sink@top1",
            "from:analyse/heads.local",
            "from:analyse/emergent-heads@top2",
            "from:analyse/receivers",
        )
    }
    assert found == {
        "from:analyse/heads@top3": ["1.1", "5.3", "5.2"],
        "from:analyse/head_attribution@bottom1": ["0.0"],
        "from:analyse/heads.sink@top1": ["0.0"],
        "from:analyse/heads.local": ["0.1", "0.2"],
        "from:analyse/emergent-heads@top2": ["0.0", "0.1"],
        "from:analyse/receivers": ["2.3", "1.1"],
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("from:heads", "names no heads; write from:analyse/NAME@top10"),
        ("from:analyse/haeds@top3", "no analysis is called 'haeds'"),
        ("from:analyse/cliff@top3", "analyse cliff --run"),
        ("from:analyse/heads@top99", "99 heads are asked for, and the result ranks 24"),
        ("from:analyse/heads", "say how many"),
        ("from:analyse/heads.width@top3", "it has span"),
        ("from:analyse/entropy@top3", "analyse entropy --run"),
    ],
)
def test_a_name_of_no_heads_is_refused_in_one_line(run, name, message):
    grid = np.arange(24.0).reshape(6, 4)
    save_scores(run, "heads", [grid], trace="a/0", metrics=["span"])
    save_scores(run, "head_attribution", grid, trace="a/0")
    with pytest.raises(InputError) as refused:
        named_heads(run_folder(run), name)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_the_template_removes_ranked_heads_in_three_ways_beside_two_controls(run, model):
    save_scores(run, "emergent_heads", np.arange(24.0).reshape(6, 4))
    study = ablate_heads(run, "from:analyse/emergent-heads@top2", n_matched=3)
    assert isinstance(study, AblationStudy)
    assert list(study.effects) == [f"emergent-heads@top2, {how}" for how in ("zero", "mean", "resample")]
    for one in study.effects.values():
        assert one.ablation.heads == (Head.parse("5.3"), Head.parse("5.2"))
        assert (len(one.null), one.n_disjoint, len(one.matched)) == (1, 1, 3)  # a block of four has two others
        assert one.distance > 0 and len(one.losses) == 4
        assert {name.split()[0] for name in one.splits} == {"difficulty", "thinking"}
        assert [one.splits[f"thinking {side}"].n_traces for side in ("on", "off")] == [2, 2]
    (saved,) = study.results
    assert saved.method == "ablation" and saved.axes[0].labels == tuple(study.effects)
    assert saved.arrays["matched"].shape == (3, 3) and saved.arrays["losses"].shape == (3, 4)
    np.testing.assert_allclose(saved.values, [one.effect.value for one in study.effects.values()])
    assert len(saved.provenance["hash"]) == 64 and saved.provenance["model"] == "organism"
    assert set(ablation_figures(saved)) == {"arms", "parts"}
    said = study.summaries(next_command="look")
    assert "3 ablations make the given answers less likely" in said[0].finding
    assert said[1].columns[1] == "traces" and said[-1].next_command == "look"


def test_the_effect_on_a_part_is_that_of_its_traces_alone(run, model):
    plan = head_plan([Head.parse("3.1")], hows=["zero"], n_matched=0)
    (whole,) = ablate(run, plan, model=model).effects.values()
    store = TraceStore.open(run / "store")
    rows = dict(_parts_of(list(store)))["thinking off"]
    alone = effects_module.ablation_effect(model, [list(store)[i] for i in rows], plan.ablations[0], n_matched=0)
    part = whole.splits["thinking off"]
    assert part.effect.value == pytest.approx(alone.effect.value, abs=1e-5)
    np.testing.assert_allclose(part.null, alone.null, atol=1e-5)
    assert "kl_thinking" not in alone.side_effects and "kl_answer" in alone.side_effects


def test_an_interrupted_plan_goes_on_and_reads_nothing_twice(run, model, monkeypatch):
    plan = Plan(
        ablations=(Ablation(name="one", mlps=(1,)), Ablation(name="two", mlps=(2,), how="resample")), n_matched=2
    )
    clean = ablate(run, plan, model=model, fresh=True)
    seen, divergences = [], effects_module.divergences

    def counted(model, traces, readers, spans):
        seen.append(len(readers))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return divergences(model, traces, readers, spans)

    monkeypatch.setattr(effects_module, "divergences", counted)
    assert ablate(run, plan, model=model).effects["one"] is not None and seen == []  # all of it was kept
    with pytest.raises(KeyboardInterrupt):
        ablate(run, plan, model=model, fresh=True)
    done = seen[0]
    again = ablate(run, plan, model=model)
    n_readings = 2 * (1 + 5 + 2)
    assert sum(seen[2:]) in (
        n_readings - done,
        n_readings - done + 1,
    )  # the ablation itself leads a batch of moves as far
    for name, one in clean.effects.items():
        assert again.effects[name].to_dict() == one.to_dict()
    longer = Plan(ablations=(*plan.ablations, Ablation(name="three", mlps=(3,))), n_matched=2)
    before = sum(seen)
    ablate(run, longer, model=model)
    # MLP 3 and the five others were read as controls of MLP 1; only two moves as far are new, led by the ablation itself
    assert sum(seen) - before == 3


def test_a_sweep_is_drawn_as_a_line_with_both_controls(run, model):
    ablations = tuple(Ablation(name=f"MLP, layer {i}", mlps=(i,)) for i in (0, 3))
    sweeps = {"MLP": Sweep(over="layer", values=(0.0, 3.0), names=tuple(one.name for one in ablations))}
    (saved,) = ablate(run, Plan(ablations=ablations, sweeps=sweeps, n_matched=2), model=model).results
    figure = ablation_figures(saved)["sweep-0"]
    line = figure.data[-1]
    assert list(line.x) == [0.0, 3.0]
    np.testing.assert_allclose(line.y, saved.values)
    assert figure.layout.xaxis.title.text == "layer" and figure.layout.yaxis.title.text == "nats per answer token"


def test_patches_of_a_plan_are_saved_with_unrelated_traces_beside_them(run, model):
    ids = [trace.id for trace in TraceStore.open(run / "store")]
    sides = {"clean": Side(trace=ids[0]), "corrupted": Side(trace=ids[1])}
    texts = {
        "clean": Side(prompt="Mia has 14 apples. So Mia has", answer=" 14"),
        "corrupted": Side(prompt="Mia has 15 apples. So Mia has", answer=" 15"),
    }
    plan = Plan(
        patches=(
            Patch(name="heads", **sides, at="heads", last=3, n_controls=1),
            Patch(name="texts", **texts, n_controls=2),
        )
    )
    study = ablate(run, plan, model=model, name="two patches")
    heads, tokens = study.patched["heads"], study.patched["texts"]
    assert [axis.name for axis in heads.axes] == ["metric", "layer", "head"]
    assert [axis.name for axis in tokens.axes] == ["metric", "layer", "token"]
    assert "2 unrelated texts" in tokens.null.what and len(tokens.numbers["pieces"]) == len(tokens.axes[-1])
    assert float(np.nanmax(tokens.values[0])) == pytest.approx(1.0, abs=0.2)
    saved = run_folder(run).analyses / "patching"
    assert sorted(path.name for path in saved.iterdir()) == [
        "two patches-heads.safetensors",
        "two patches-texts.safetensors",
    ]
    (figure,) = ablation_figures(tokens).values()
    assert figure.layout.xaxis.title.text == "token" and figure.layout.yaxis.title.text == "layer"
    assert "alone recovers" in study.summaries()[-1].finding
    unequal = Plan(patches=(Patch(name="x", **sides),))
    with pytest.raises(InputError, match="cannot be paired"):
        ablate(run, unequal, model=model)


def test_patching_from_python_takes_texts_ids_and_traces(model):
    clean, corrupted = "Mia has 14 apples. So Mia has", "Mia has 15 apples. So Mia has"
    found = activation_patching(model, clean, corrupted, answers=(" 14", " 15"), unrelated=[corrupted])
    assert found.values.shape[:2] == (4, model.n_layers)
    assert not (found.values[0] > found.null.high[0]).all()
    np.testing.assert_allclose(found.null.high[0], 0, atol=1e-6)  # the corrupted text's own states change nothing
    by_ids = activation_patching(
        model, model.encode_text(clean), model.encode_text(corrupted), answers=(" 14", " 15"), at="heads"
    )
    assert by_ids.null is None and by_ids.null_missing
    with pytest.raises(InputError, match="answers="):
        activation_patching(model, clean, corrupted)


def test_heads_cannot_be_removed_from_thinking_that_is_switched_off(model, tmp_path):
    problems = load_problems("ledger", n=2)
    record(model, problems, tmp_path / "off", sampling=Sampling(max_new_tokens=4), think=False)
    with pytest.raises(InputError, match="leave out --on think"):
        ablate_heads(tmp_path / "off", "2.1", on="think")
