"""Held-out predictions never see their own group; intervals resample groups."""

import inspect
import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, KFold, cross_val_predict
from sklearn.pipeline import make_pipeline

from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Resamples, resample_groups
from reasonscope.data.ranks import auroc, spearman
from reasonscope.data.text.parse import trace_from_text
from reasonscope.data.trace import Message, Problem
from reasonscope.probes.evaluation.baselines import BASELINES, Points, residual_sites
from reasonscope.probes.evaluation.conformal import residual_band
from reasonscope.probes.evaluation.grouped_folds import (
    _problem_groups,
    above_best,
    cluster_bootstrap,
    difference_to_best,
    direction_cosines,
    grouped_folds,
    grouped_predictions,
    nested_folds,
    predict,
    trace_groups,
)
from reasonscope.probes.evaluation.permutation_null import (
    _control_labels,
    _shuffled_between,
    _shuffled_within,
    control_task,
    permutation_null,
)


@pytest.mark.parametrize("call", [cluster_bootstrap, difference_to_best, resample_groups, Resamples])
def test_every_interval_is_of_1000_resamples_and_one_seed(call):
    defaults = inspect.signature(call).parameters
    assert (defaults["n_resamples"].default, defaults["seed"].default) == (1000, 0)


@pytest.mark.parametrize("call", [grouped_folds, nested_folds, grouped_predictions])
def test_every_split_is_in_five_of_a_regression(call):
    defaults = inspect.signature(call).parameters
    assert [defaults[name].default for name in ("folds", "seed", "task")] == [5, 0, "regression"]


def test_a_quantity_that_never_varies_is_split_and_a_class_is_not():
    groups = [str(i) for i in range(10)]
    assert len(grouped_folds(np.zeros(10), groups)) == 5
    with pytest.raises(InputError, match="class"):
        grouped_folds(np.zeros(10), groups, task="binary")


def test_the_difference_to_the_best_is_that_of_the_rows_themselves():
    """The first row of the scores is of all groups; the best baseline is another one in each row."""
    ours = np.array([0.9, *np.linspace(0.5, 0.6, 1000)])
    theirs = np.stack([np.full(1001, 0.3), np.array([0.2, *np.full(1000, 0.4)])], axis=1)
    found = above_best(ours, theirs, 40)
    assert found.value == pytest.approx(0.6)
    assert 0.09 < found.low < 0.11 and 0.19 < found.high < 0.21


def test_a_label_that_only_the_group_knows_cannot_be_predicted():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 5)
    features = np.eye(60)[groups]  # the group itself: with its rows in the training part the label would be known
    targets = rng.standard_normal(60)[groups]
    predictions = grouped_predictions(Ridge(alpha=1e-3), features, targets, groups.astype(str).tolist())
    assert np.isfinite(predictions).all()
    assert abs(spearman(targets, predictions)) < 0.35
    assert spearman(targets, Ridge(alpha=1e-3).fit(features, targets).predict(features)) > 0.99


def test_the_penalty_is_chosen_inside_the_fold():
    rng = np.random.default_rng(1)
    features = rng.standard_normal((80, 60))
    targets = features[:, 0] + 2 * rng.standard_normal(80)
    groups = [str(i) for i in range(80)]
    chosen = grouped_predictions(Ridge(), features, targets, groups, grid={"alpha": [1e-6, 100.0]})
    loose = grouped_predictions(Ridge(alpha=1e-6), features, targets, groups)
    assert np.mean((chosen - targets) ** 2) < np.mean((loose - targets) ** 2)


@pytest.mark.parametrize("task", ["regression", "binary"])
def test_the_search_finds_what_that_of_scikit_learn_finds(task):
    rng = np.random.default_rng(4)
    words = rng.integers(9, size=(60, 8))
    texts = np.array([" ".join(f"w{word}" for word in row) for row in words], dtype=object)
    targets = (words == 0).sum(axis=1) + rng.standard_normal(60)
    targets = (targets > np.median(targets)).astype(float) if task == "binary" else targets
    groups = [str(i // 2) for i in range(60)]
    linear, name, scoring = (
        (LogisticRegression(), "logisticregression__C", "neg_log_loss")
        if task == "binary"
        else (Ridge(), "ridge__alpha", "neg_mean_squared_error")
    )
    estimator = make_pipeline(TfidfVectorizer(), linear)
    for grid in ({name: [0.01, 1.0, 100.0]}, {name: [0.01, 1.0], "tfidfvectorizer__sublinear_tf": [False, True]}):
        expected = np.full(60, np.nan)
        for nested in nested_folds(targets, groups, task=task):
            splits = [(fold.train, fold.test) for fold in nested.inner]
            search = GridSearchCV(estimator, grid, cv=splits, scoring=scoring, refit=False).fit(texts, targets)
            fitted = clone(estimator).set_params(**search.best_params_)
            fitted.fit(texts[nested.outer.train], targets[nested.outer.train])
            expected[nested.outer.test] = predict(fitted, texts[nested.outer.test], task)
        np.testing.assert_array_equal(
            grouped_predictions(estimator, texts, targets, groups, grid=grid, task=task), expected
        )


def test_the_interval_widens_if_rows_share_a_group():
    rng = np.random.default_rng(2)
    common = np.repeat(rng.standard_normal(30), 10)

    def mean(_, values):
        return float(values.mean())

    apart = cluster_bootstrap(mean, common, common, [str(i) for i in range(300)])
    together = cluster_bootstrap(mean, common, common, np.repeat(np.arange(30), 10).astype(str).tolist())
    assert apart.value == together.value == pytest.approx(common.mean())
    assert together.high - together.low > 2 * (apart.high - apart.low)
    assert together.low < together.value < together.high


def test_a_constant_orders_nothing():
    assert spearman(np.arange(5.0), np.ones(5)) == spearman(np.ones(5), np.arange(5.0)) == 0.0
    assert spearman(np.arange(5.0), np.exp(np.arange(5.0))) == pytest.approx(1)
    assert spearman(np.arange(5.0) / 9, -np.arange(5.0) / 9) == pytest.approx(-1)


def test_a_metric_that_half_of_the_resamples_do_not_have_still_has_an_interval():
    half, fewer = itertools.cycle([1.0, np.nan]), itertools.chain([1.0] * 5, itertools.repeat(np.nan))
    found = resample_groups(lambda rows: next(half), ["a", "b"], n_resamples=10)
    assert (found.value, found.low, found.high) == (1, 1, 1)
    with pytest.raises(InputError, match="most resamples"):
        resample_groups(lambda rows: next(fewer), ["a", "b"], n_resamples=10)
    resamples, statistics = Resamples(["a", "b"], n_resamples=4), np.array([5.0, 1.0, np.nan, np.nan, 1.0])
    assert resamples.estimate(statistics).interval == (1, 1)
    assert resamples.estimate(np.array([5.0, 1.0, np.nan, np.nan, np.nan])) is None
    assert resamples.estimate(np.array([np.nan, 1.0, 1.0, 1.0, 1.0])) is None


def asked(problem, group, prompt=None, words="What is 3 + 4?"):
    messages = () if prompt is not None else (Message(role="user", content=words),)
    return trace_from_text(
        id=f"{problem}/0",
        problem=Problem(id=problem, group=group, prompt=prompt, messages=messages),
        prompt="Q",
        completion="<think>7</think>7",
    )


def test_traces_of_one_question_need_one_group():
    assert trace_groups([asked("a", "x"), asked("b", "y", words="Else?"), asked("a", "x")]) == ["x", "y", "x"]
    assert trace_groups([asked("a", "x", prompt=""), asked("b", "y", prompt="")]) == ["x", "y"]
    for other in (asked("b", "y"), asked("c", "y", prompt="user: What is 3 + 4?")):
        with pytest.raises(InputError, match=f"'a' and '{other.problem.id}' ask the same in the groups 'x' and 'y'"):
            trace_groups([asked("a", "x"), other])
    with pytest.raises(InputError, match="'a' has rows in the groups 'x' and 'y'"):
        trace_groups([asked("a", "x"), asked("a", "y", words="Else?")])


def test_too_few_groups_and_nan_are_refused():
    with pytest.raises(InputError, match="3 groups of problems for 5 folds"):
        grouped_predictions(Ridge(), np.zeros((6, 1)), np.zeros(6), ["a", "b", "c"] * 2)
    with pytest.raises(InputError, match="2 groups of problems for 1 folds"):
        grouped_folds(np.zeros(6), ["a", "b"] * 3, folds=1)
    with pytest.raises(InputError, match="NaN"):
        grouped_predictions(Ridge(), np.full((6, 1), np.nan), np.zeros(6), list("abcdef"))


@pytest.mark.parametrize("task", ["regression", "binary"])
@pytest.mark.parametrize("groups", range(2, 8))
@pytest.mark.parametrize("folds", range(2, 8))
def test_folds_that_an_error_advises_work(task, groups, folds):
    """Of two classes, the rarer is in `groups` groups of problems; and if nothing is advised, no number of folds works."""
    names = [f"rare {i}" for i in range(groups)] + [f"other {i}" for i in range(12 * (task == "binary"))]
    targets = np.array([float(name.startswith("rare")) for name in names])

    def fails(folds):
        try:
            nested_folds(targets, names, task=task, folds=folds)
        except InputError as error:
            return str(error)
        return ""

    if message := fails(folds):
        advised = re.search(r"--folds (\d)", message)
        assert "record more" in message and " 1 folds" not in message
        assert not fails(int(advised[1])) if advised else all(fails(k) for k in range(2, 8)), message


@pytest.fixture
def questions():
    """80 problems of 6 rollouts: the question's words, and a label that depends on the problem alone."""
    rng = np.random.default_rng(0)
    words = np.array([f"word{i}" for i in range(400)])
    texts = np.repeat([" ".join(rng.choice(words, 12)) for _ in range(80)], 6)
    labels = np.repeat(rng.permutation(np.repeat([0.0, 1.0], 40)), 6)
    return np.array(texts, dtype=object), labels, np.repeat(np.arange(80), 6).astype(str).tolist()


def test_a_classifier_of_the_question_is_at_chance_on_labels_of_the_problem(questions):
    """And is not where rows are split at random: that is the leak which the default splitter closes."""
    texts, labels, groups = questions
    classifier = make_pipeline(TfidfVectorizer(), LogisticRegression())
    held = grouped_predictions(classifier, texts, labels, groups, task="binary")
    estimate = cluster_bootstrap(auroc, labels, held, groups, n_resamples=200)
    assert estimate.low < 0.5 < estimate.high
    leaky = cross_val_predict(
        classifier, texts, labels, cv=KFold(5, shuffle=True, random_state=0), method="predict_proba"
    )
    assert auroc(labels, leaky[:, 1]) > 0.95


def test_rows_of_a_problem_need_one_group():
    assert _problem_groups(["a", "b"]) == ["row 0", "row 1"]
    assert _problem_groups(["a", "a", "b"], ["x", "x", "x"]) == ["x", "x", "x"]
    with pytest.raises(InputError, match="problem 'a' has rows in the groups 'row 0' and 'row 2'"):
        _problem_groups(["a", "b", "a"])
    with pytest.raises(InputError, match="2 groups for 3 rows"):
        _problem_groups(["a", "b", "c"], ["x", "y"])


def test_no_group_is_on_two_sides_of_any_fold(questions):
    _, labels, groups = questions
    names = np.asarray(groups)
    for nested in nested_folds(labels, groups, task="binary"):
        assert not set(names[nested.outer.train]) & set(names[nested.outer.test])
        assert set(np.concatenate([fold.test for fold in nested.inner])) == set(nested.outer.train)
        for fold in nested.inner:
            assert not set(names[fold.train]) & set(names[fold.test])
            assert not set(fold.train) & set(nested.outer.test)


def test_folds_hold_both_classes_in_equal_shares():
    targets, groups = np.repeat([0.0, 1.0], [40, 20]), [f"{i // 2}" for i in range(60)]
    found = grouped_folds(targets, groups, task="binary")
    assert [(len(fold.test), targets[fold.test].sum()) for fold in found] == [(12, 4)] * 5
    assert sorted(np.concatenate([fold.test for fold in found])) == list(range(60))
    assert len(grouped_folds(targets, groups, folds=2)) == 2
    tests = [
        grouped_folds(targets, groups, task=task, seed=seed)[0].test
        for task in ("regression", "binary")
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(tests[0], tests[1])
    np.testing.assert_array_equal(tests[3], tests[4])
    assert set(tests[0]) != set(tests[2]) and set(tests[3]) != set(tests[5])


def test_inner_folds_are_fewer_if_a_class_has_fewer_groups_left():
    targets, groups = np.repeat([0.0, 1.0], [15, 5]), [str(i) for i in range(20)]
    assert [len(nested.inner) for nested in nested_folds(targets, groups, task="binary")] == [4] * 5
    assert [len(nested.inner) for nested in nested_folds(targets, groups[:10] * 2, folds=5)] == [5] * 5
    assert [len(nested.inner) for nested in nested_folds(targets, list("abcde") * 4, folds=5)] == [4] * 5


def test_what_a_grid_names_is_chosen_for_either_task():
    rng = np.random.default_rng(3)
    features = rng.standard_normal((60, 30))
    targets = (features[:, 0] + rng.standard_normal(60) > 0).astype(float)
    groups = [str(i) for i in range(60)]
    grid = {"C": [1e-3, 1e3]}
    chosen = grouped_predictions(LogisticRegression(), features, targets, groups, grid=grid, task="binary")
    tight = grouped_predictions(LogisticRegression(C=1e-3), features, targets, groups, task="binary")
    np.testing.assert_array_equal(chosen, tight)  # overconfident otherwise: the choice is by the likelihood
    assert ((chosen > 0) & (chosen < 1)).all()


@pytest.mark.parametrize(
    ("targets", "groups", "message"),
    [
        (np.ones(10), list("abcdefghij"), "all 10 rows are of class 1"),
        (np.array([1.0, *[0.0] * 9]), list("abcdefghij"), "class 1 is in 1 groups of problems for 5 folds"),
        (np.arange(10.0), list("abcdefghij"), "have to be 0 and 1"),
        (np.array([0.0, 1.0] * 5), ["a"] * 10, "1 groups of problems for 5 folds"),
        (np.array([0.0, np.nan] * 5), list("abcdefghij"), "NaN"),
        (np.array([0.0, 1.0] * 5), list("abcd"), "4 groups for 10 rows"),
    ],
)
def test_bad_targets_are_one_clear_error(targets, groups, message):
    with pytest.raises(InputError, match=message):
        grouped_folds(targets, groups, task="binary")


def test_one_group_has_no_interval_and_one_class_no_value():
    with pytest.raises(InputError, match="one group"):
        cluster_bootstrap(spearman, np.arange(4.0), np.arange(4.0), ["a"] * 4)
    with pytest.raises(InputError, match="undefined"):
        cluster_bootstrap(auroc, np.ones(4), np.arange(4.0), list("abcd"))


def test_the_difference_is_paired_and_knows_that_the_best_was_chosen():
    rng = np.random.default_rng(5)
    truth = rng.standard_normal(150)
    groups = [str(i // 2) for i in range(150)]
    noisy = truth + rng.standard_normal(150)
    near = noisy + 0.05 * rng.standard_normal(150)
    same = difference_to_best(spearman, truth, noisy, {"itself": noisy}, groups)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    close = difference_to_best(spearman, truth, noisy, {"near": near}, groups, n_resamples=300)
    alone = cluster_bootstrap(spearman, truth, noisy, groups, n_resamples=300)
    assert close.high - close.low < (alone.high - alone.low) / 3
    twice = difference_to_best(
        spearman, truth, noisy, {"near": near, "noise": rng.standard_normal(150)}, groups, n_resamples=300
    )
    assert twice.value == close.value and twice.low <= close.low
    with pytest.raises(InputError, match="no baseline"):
        difference_to_best(spearman, truth, noisy, {}, groups)


def test_cosines_of_directions():
    assert direction_cosines(np.array([[1.0, 0.0], [2.0, 0.0], [0.0, -3.0]])) == pytest.approx(
        np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]])
    )
    with pytest.raises(InputError, match="length 0"):
        direction_cosines(np.zeros((2, 3)))


def test_shuffles_keep_what_they_say():
    targets = np.arange(12.0)
    groups = list("aaabbbcccddd")
    within = _shuffled_within(targets, groups, seed=0)
    assert [set(part) for part in within.reshape(4, 3)] == [set(part) for part in targets.reshape(4, 3)]
    assert not np.array_equal(within, targets)
    between = _shuffled_between(targets, groups, seed=0)
    assert {tuple(part) for part in between.reshape(4, 3)} == {tuple(part) for part in targets.reshape(4, 3)}
    assert not np.array_equal(between, targets)


def test_shuffles_between_groups_of_other_sizes_keep_what_a_group_shares_and_its_order():
    groups = list("aaaaabbbcdd")
    shared = np.array([10.0] * 5 + [20.0] * 3 + [30.0] + [40.0] * 2)
    places = np.array([0.0, 0.25, 0.5, 0.75, 1.0, 0.0, 0.5, 1.0, 0.5, 0.0, 1.0])
    labels = np.asarray(groups)
    for seed in range(20):
        moved, placed = (_shuffled_between(targets, groups, seed=seed) for targets in (shared, places))
        assert all(np.ptp(moved[labels == group]) == 0 for group in "abcd")
        assert sorted(moved[labels == group][0] for group in "abcd") == [10.0, 20.0, 30.0, 40.0]
        assert all((np.diff(placed[labels == group]) >= 0).all() for group in "abcd")


def test_shuffled_labels_leave_nothing_to_find():
    rng = np.random.default_rng(8)
    features = rng.standard_normal((90, 5))
    targets = features[:, 0] + 0.3 * rng.standard_normal(90)
    groups = [str(i // 3) for i in range(90)]

    def judge(values):
        return spearman(values, grouped_predictions(Ridge(), features, values, groups))

    null = permutation_null(judge, targets, groups, within=False, n_permutations=19)
    assert null.observed > 0.8 > 0.5 > null.null.max()
    assert null.p_value == 0.05
    kept = {"observed": null.observed, "mean": np.mean(null.null), "highest": max(null.null), "p_value": 0.05}
    assert null.to_dict() == pytest.approx({**kept, "n_permutations": 19})
    assert inspect.signature(permutation_null).parameters["n_permutations"].default == 20
    with pytest.raises(InputError, match="no shuffle within groups"):
        permutation_null(judge, np.repeat(targets[::3], 3), groups, within=True, n_permutations=3)


def test_random_labels_of_a_type_cannot_be_learned_across_groups_of_it():
    """Hewitt and Liang's control, on the problem itself: above chance only where folds share problems."""
    rng = np.random.default_rng(9)
    problems = np.repeat(np.arange(40), 5)
    features = np.hstack([np.eye(40)[problems], rng.standard_normal((200, 3))])
    targets = (features[:, -1] > 0).astype(float)
    groups = problems.astype(str).tolist()

    def predict(labels):
        return grouped_predictions(LogisticRegression(), features, labels, groups, task="binary")

    found = control_task(auroc, targets, predict, problems.tolist(), groups, n_resamples=100)
    assert found.task.low > 0.9
    assert found.control.low < 0.5 < found.control.high
    assert found.selectivity.low > 0.1
    assert found.selectivity.value == pytest.approx(found.task.value - found.control.value)
    labels = _control_labels(problems.tolist(), targets, seed=0)
    seen = LogisticRegression(C=100).fit(features, labels).predict_proba(features)[:, 1]
    assert auroc(labels, seen) > 0.95


@pytest.mark.parametrize("rows_per_group", [1, 4])
def test_the_interval_covers_new_groups(rows_per_group):
    rng = np.random.default_rng(10)
    inside = []
    for _ in range(300):
        shared = np.repeat(rng.standard_normal(30), rows_per_group)
        residuals = np.exp(shared + 0.5 * rng.standard_normal(len(shared)))  # skewed
        groups = np.repeat(np.arange(30), rows_per_group).astype(str).tolist()
        band = residual_band(residuals, np.zeros(len(residuals), dtype=bool), groups, coverage=0.8)
        inside.append(band.low <= np.exp(rng.standard_normal() + 0.5 * rng.standard_normal()) <= band.high)
    assert 0.76 < np.mean(inside) < 0.9


def test_an_interval_that_nobody_can_know_is_infinite():
    residuals, groups = np.arange(40.0), [str(i) for i in range(40)]
    assert residual_band(residuals[:10], np.zeros(10, dtype=bool), groups[:10]).high == np.inf
    cut = residual_band(residuals, residuals > 35, groups)
    assert np.isfinite(cut.low) and cut.high == np.inf
    with pytest.raises(InputError, match="between 0 and 1"):
        residual_band(residuals, residuals > 35, groups, coverage=90)


def test_points_and_sites_are_checked():
    class Run:
        sites = ("resid_post.1", "resid_pre.0", "resid_pre.2", "z.0", "resid_post.0")

    assert [str(site) for site in residual_sites(Run())] == ["resid_pre.0", "resid_post.0", "resid_post.1"]
    with pytest.raises(InputError, match="1 traces and 2 tokens"):
        Points(traces=[None], tokens=[0, 1])


def test_baselines_that_need_no_activations_by_hand():
    closed, cut = (
        SimpleNamespace(n_prompt_tokens=3, n_thinking_tokens=n, state=state)
        for n, state in ((4, "closed"), (9, "truncated"))
    )
    assert Points.last_prompt_tokens([closed, cut]).tokens == [2, 2]
    points = Points(traces=[closed, cut], tokens=[2, 6])
    wanted = {
        "class_prior": [[0.0], [0.0]],
        "prompt_length": np.log([[4.0], [4.0]]),
        "elapsed_position": [[0.0, 0.0], [4.0, np.log(5.0)]],
        "thinking_length": np.log([[5.0], [10.0]]),
        "truncated": [[0.0], [1.0]],
    }
    for name, rows in wanted.items():
        np.testing.assert_allclose(BASELINES[name](points), rows)
