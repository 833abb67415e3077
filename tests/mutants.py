"""Changes one thing at a time in the code that computes numbers, and checks whether a test notices.

    python tests/mutants.py [--sample 12] [--seed 0] [--only data/storage/store.py] [--out docs/mutants.md]

A mutant is one changed operator, comparison, constant or condition of a file below; its tests run in a process of their own, which
imports the changed code in place of the real one. It is killed where a test fails or computes three times as long. Survivors are listed
with their line and, where `mutants.toml` knows it, the reason why no test can tell them from the original; they count as survivors all the
same. mutmut and cosmic-ray look for a package where its folder is called so, and ours are mapped (`data` is `reasonscope.data`), hence
this script.
"""

import argparse
import ast
import gc
import hashlib
import importlib.abc
import importlib.util
import os
import random
import re
import resource
import signal
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Each file, and the tests that are to notice. Of the organism, corpus.py and train.py are not here: they are its training, and what says
# whether the mixture of texts is right is the trained organism, not a test of seconds.
TARGETS = {
    "data/text/align.py": ["tests/data/text/test_align.py"],
    "data/text/answers.py": ["tests/data/text/test_answers.py"],
    "data/text/behaviour.py": ["tests/data/text/test_behaviour.py"],
    "data/storage/durable.py": ["tests/data/storage/test_durable.py", "tests/data/storage/test_store.py"],
    "data/exchange/export.py": ["tests/data/exchange/test_importers.py"],
    "data/storage/safetensors_file.py": ["tests/data/storage/test_safetensors_file.py"],
    "data/exchange/importers.py": ["tests/data/exchange/test_importers.py", "tests/data/exchange/test_dumps.py"],
    "data/random_sets.py": ["tests/data/test_random_sets.py"],
    "data/intervals.py": ["tests/data/test_intervals.py", "tests/probes/evaluation/test_grouped_folds.py"],
    "data/text/sentence_labels.py": ["tests/data/text/test_sentence_labels.py"],
    "data/storage/manifest.py": ["tests/data/storage/test_manifest.py", "tests/data/storage/test_store.py"],
    "data/organism/forms.py": ["tests/data/organism/test_organism.py"],
    "data/organism/ledger.py": ["tests/data/organism/test_organism.py"],
    "data/organism/reader.py": ["tests/data/organism/test_organism.py"],
    "data/organism/requests.py": ["tests/data/organism/test_organism.py"],
    "data/organism/tokenizer.py": ["tests/data/organism/test_organism.py"],
    "data/organism/truth.py": ["tests/data/organism/test_organism.py"],
    "data/organism/writer.py": ["tests/data/organism/test_organism.py"],
    "data/text/parse.py": ["tests/data/text/test_parse.py", "tests/data/text/test_thinking.py"],
    "data/exchange/problem_sets.py": ["tests/data/exchange/test_problem_sets.py"],
    "data/storage/untrusted.py": ["tests/data/storage/test_untrusted.py"],
    "data/storage/records.py": ["tests/data/storage/test_store.py"],
    "data/storage/token_scores.py": ["tests/data/storage/test_token_scores.py"],
    "data/text/steps_and_sentences.py": ["tests/data/text/test_steps_and_sentences.py"],
    "data/storage/shards.py": [
        "tests/data/storage/test_store.py",
        "tests/faults/test_store_faults.py::test_a_type_that_was_changed_in_a_header_is_never_read",
    ],
    "data/text/sentence_splitter.py": ["tests/data/text/test_sentence_splitter.py"],
    "data/storage/soundness.py": ["tests/data/storage/test_store.py"],
    "data/storage/store.py": ["tests/data/storage/test_store.py", "tests/data/storage/test_merge.py"],
    "data/storage/writer_lock.py": ["tests/data/storage/test_store.py", "tests/faults/test_store_faults.py"],
    "data/trace.py": ["tests/data/test_trace.py", "tests/data/text/test_parse.py"],
    "probes/architecture/heads.py": ["tests/probes/architecture/test_heads.py"],
    "probes/fitting/linear_probes.py": ["tests/probes/fitting/test_linear_probes.py"],
    "probes/fitting/newton.py": ["tests/probes/fitting/test_newton.py"],
    "probes/fitting/baseline_fits.py": ["tests/probes/fitting/test_baseline_fits.py"],
    "probes/fitting/permuted_sweep.py": ["tests/probes/fitting/test_permuted_sweep.py"],
    "probes/evaluation/baselines.py": [
        "tests/probes/evaluation/test_baselines.py",
        "tests/probes/evaluation/test_grouped_folds.py::test_baselines_that_need_no_activations_by_hand",
        "tests/probes/evaluation/test_grouped_folds.py::test_points_and_sites_are_checked",
        "tests/probes/properties/test_report.py::test_the_finding_is_one_sentence_with_its_verdict",
    ],
    "probes/evaluation/comparison.py": ["tests/probes/properties/test_report.py"],
    "probes/evaluation/permutation_null.py": ["tests/probes/evaluation/test_grouped_folds.py"],
    "probes/evaluation/grouped_folds.py": ["tests/probes/evaluation/test_grouped_folds.py"],
    "probes/evaluation/conformal.py": [
        "tests/probes/evaluation/test_grouped_folds.py",
        "tests/steering/decoding/test_monitor.py",
    ],
    "steering/decoding/budget.py": [
        "tests/steering/decoding/test_budget.py",
        "tests/steering/methods/test_controllers.py",
    ],
    "steering/ablation/controls.py": ["tests/steering/ablation/test_controls.py"],
    "steering/ablation/effects.py": [
        "tests/steering/ablation/test_ablation.py",
        "tests/analysis/ablations/test_ablations_of_runs.py",
    ],
    "steering/ablation/directions.py": [
        "tests/steering/ablation/test_interventions.py",
        "tests/steering/ablation/test_controls.py",
    ],
    "steering/ablation/interventions.py": [
        "tests/steering/ablation/test_interventions.py",
        "tests/steering/ablation/test_ablation.py",
    ],
    "steering/ablation/knockout.py": [
        "tests/steering/ablation/test_knockout.py",
        "tests/steering/ablation/test_controls.py",
    ],
    "steering/ablation/patching.py": [
        f"tests/steering/ablation/test_patching.py::test_{name}"
        for name in (
            "the_differing_token_gives_everything_back_at_the_input_and_nothing_elsewhere",
            "all_heads_together_are_the_attention",
            "what_was_patched_is_not_patched_again",
            "texts_go_on_with_what_the_answers_share_and_are_told_apart_by_the_next_token",
            "traces_are_read_up_to_the_token_in_which_their_answers_differ",
            "texts_that_cannot_be_paired_are_refused",
            "a_model_without_attention_has_no_heads_to_patch",
        )
    ],
    "steering/ablation/plan.py": ["tests/steering/ablation/test_plan.py"],
    "steering/ablation/targets.py": [
        "tests/steering/ablation/test_plan.py",
        "tests/steering/ablation/test_controls.py",
        "tests/steering/ablation/test_interventions.py",
    ],
    "steering/engine/stops.py": ["tests/steering/engine/test_engine_monitor.py"],
    "steering/exits/places.py": [
        "tests/analysis/exits/test_exits.py::test_places_are_inside_the_thinking_that_was_written",
        "tests/analysis/exits/test_exits.py::test_the_signals_of_a_trace_are_what_the_model_says_at_its_cuts",
        "tests/analysis/exits/test_exits.py::test_a_full_stop_after_a_digit_ends_a_sentence_once_white_space_follows",
        "tests/analysis/exits/test_exits.py::test_a_finished_text_and_one_that_is_written_have_the_same_sentences",
        "tests/analysis/exits/test_exits.py::test_a_probe_of_one_half_of_a_run_is_calibrated_and_judged_on_the_other",
    ],
    "steering/exits/rules.py": [
        "tests/analysis/exits/test_exits.py::test_each_rule_stops_where_its_signal_says_so",
        "tests/analysis/exits/test_exits.py::test_a_rule_never_stops_at_an_undefined_number",
    ],
    "steering/exits/signals.py": [
        "tests/analysis/exits/test_exits.py::test_the_signals_of_a_trace_are_what_the_model_says_at_its_cuts",
    ],
    "steering/experiments/dose_responses.py": [
        "tests/steering/experiments/test_summaries.py",
        "tests/steering/experiments/test_dose_responses.py",
    ],
    "steering/vectors/matched_controls.py": ["tests/steering/vectors/test_matched_controls.py"],
    "steering/vectors/intervention.py": [
        "tests/steering/vectors/test_intervention.py",
        "tests/steering/vectors/test_matched_controls.py",
        "tests/steering/vectors/test_scope.py",
        "tests/steering/vectors/test_patching.py",
    ],
    "steering/methods/adaptive.py": [
        "tests/steering/methods/test_thinking_speed.py",
        "tests/steering/methods/test_controllers.py",
        "tests/steering/experiments/test_conditions.py::test_adaptive_steering_tells_how_far_it_moved_each_token_and_its_controls_move_as_far",
        "tests/steering/experiments/test_conditions.py::test_the_steady_form_of_adaptive_steering_keeps_its_sign_and_its_tokens",
    ],
    "steering/methods/expert_routing.py": ["tests/steering/methods/test_expert_routing.py"],
    "steering/vectors/vector.py": [
        "tests/steering/vectors/test_vector.py",
        "tests/steering/vectors/test_matched_controls.py",
        "tests/steering/vectors/test_patching.py",
    ],
    "steering/vectors/operators.py": [
        "tests/steering/vectors/test_operators.py",
        "tests/steering/vectors/test_matched_controls.py",
    ],
    "steering/vectors/application.py": ["tests/steering/vectors/test_application.py"],
    "steering/vectors/scope.py": [
        "tests/steering/vectors/test_scope.py",
        "tests/steering/vectors/test_thinking_by_text.py",
    ],
    "probes/vllm/wire.py": ["tests/probes/vllm/test_wire.py"],
    "analysis/ablations/run.py": ["tests/analysis/ablations/test_ablations_of_runs.py"],
    "analysis/exits/evaluation.py": [
        f"tests/analysis/exits/test_exits.py::test_{name}"
        for name in (
            "each_rule_stops_where_its_signal_says_so",
            "a_rule_never_stops_at_an_undefined_number",
            "the_threshold_is_the_cheapest_that_keeps_the_accuracy",
            "a_rule_that_knows_saves_tokens_and_one_that_does_not_saves_none",
            "the_best_rule_is_named_only_if_it_saves_whichever_rule_is_looked_at",
            "thresholds_are_judged_on_other_problems",
            "thoughts_that_were_right_before_they_went_on",
        )
    ],
    "analysis/studies/plan.py": ["tests/analysis/studies/test_plan.py"],
    "analysis/studies/state.py": ["tests/analysis/studies/test_state.py", "tests/analysis/studies/test_studies.py"],
    "analysis/studies/claims.py": ["tests/analysis/studies/test_claims.py"],
    "analysis/tokens/mi.py": ["tests/analysis/tokens/test_mi.py"],
    "analysis/causal/suppression.py": ["tests/analysis/causal/test_suppression.py"],
    "analysis/traces/steered_pairs.py": ["tests/analysis/traces/test_steered_pairs.py"],
    "analysis/tokens/nocco.py": ["tests/analysis/tokens/test_nocco.py"],
    "analysis/causal/attribution_patching.py": ["tests/analysis/causal/test_attribution_patching.py"],
    "analysis/statistics.py": ["tests/analysis/test_statistics.py"],
}
# Of each file: survivors as `function: before → after`, and why no test tells them from the original.
REASONS: dict[str, dict[str, str]] = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text(encoding="utf-8"))
# These start another process, which imports the real code.
OTHER_PROCESSES = [
    f"--deselect=tests/data/storage/test_store.py::test_{name}"
    for name in ("a_killed_writer_loses_at_most_one_shard", "it_opens_with_pyarrow_and_safetensors_alone")
]
# What takes long to import, once for all forks; nothing of ours.
SLOW_IMPORTS = (
    "hypothesis",
    "pyarrow.parquet",
    "pytest",
    "scipy.stats",
    "sklearn.decomposition",
    "sklearn.linear_model",
    "sklearn.model_selection",
    "sklearn.pipeline",
    "torch.testing",
    "transformers.generation.utils",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)
MEMORY = 8 * 2**30  # of a mutant whose loop never ends and gathers something
_COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult,
    ast.MatMult: ast.Add, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """The node number `index` of a file in the order of `ast.walk`, changed in way `how`; in a chain of comparisons, number `link`."""

    file: str
    line: int
    index: int
    how: str
    link: int = 0


@dataclass(frozen=True, kw_only=True)
class Change:
    """The whole file with the change in it, and what it is: `function: before → after`."""

    tree: ast.Module
    what: str


def mutants(file: str) -> list[Mutant]:
    """Every mutant of a file. What nobody computes with is left alone: annotations, docstrings, the words of errors."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    left = {id(inner) for node in _silent(tree) for inner in ast.walk(node)}
    found = []
    for index, node in enumerate(ast.walk(tree)):
        if id(node) not in left:
            found += [
                Mutant(file=file, line=getattr(node, "lineno", 0), index=index, how=how, link=link)
                for link, how in _ways(node)
            ]
    return found


def _silent(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom | ast.JoinedStr) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            yield node
        elif isinstance(node, ast.AnnAssign) or (isinstance(node, ast.arg) and node.annotation is not None):
            yield node.annotation
        elif isinstance(node, ast.FunctionDef):
            yield from node.decorator_list
            if node.returns is not None:
                yield node.returns
        elif isinstance(node, ast.ClassDef):
            yield from (*node.decorator_list, *node.bases)
        elif isinstance(node, ast.Module):
            # Literal[…] and other types, which have no line of their own kind.
            yield from (
                line.value
                for line in node.body
                if isinstance(line, ast.Assign) and isinstance(line.value, ast.Subscript)
            )
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "TypeVar",
            "cast",
            "InputError",
            "StoreError",
        ):
            yield node


def _ways(node: ast.AST) -> list[tuple[int, str]]:
    if isinstance(node, ast.Compare):
        return [(link, "comparison") for link, op in enumerate(node.ops) if type(op) in _COMPARISONS]
    if isinstance(node, ast.BinOp | ast.AugAssign):
        return [(0, "operator")] if type(node.op) in _OPERATORS else []
    if isinstance(node, ast.BoolOp):
        return [(0, "and/or")]
    if isinstance(node, ast.UnaryOp):
        return [(0, "without not or minus")] if isinstance(node.op, ast.Not | ast.USub) else []
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool | int | float):
            return [(0, "constant")]
        return [(0, "text")] if isinstance(node.value, str) and node.value else []
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        return [(0, "condition")]
    if isinstance(node, ast.Return):
        return [] if node.value is None or ast.unparse(node.value) == "None" else [(0, "returns None")]
    if isinstance(node, ast.Continue | ast.Break):
        return [(0, "pass")]
    return []


def changed(mutant: Mutant) -> Change:
    tree = ast.parse((ROOT / mutant.file).read_text(encoding="utf-8"))
    node = list(ast.walk(tree))[mutant.index]
    parents = {id(child): parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    seen = _seen(node, parents)
    before = ast.unparse(seen)
    new = _new(node, mutant)
    if new is not node:
        _replace(parents[id(node)], node, new)
    after = ast.unparse(seen if seen is not node else new)
    return Change(tree=ast.fix_missing_locations(tree), what=f"{_function(node, parents)}: {_one_line(before, after)}")


def _seen(node: ast.AST, parents: dict[int, ast.AST]) -> ast.AST:
    """What of the code around `node` one has to read to know it: a test of its own, a number or word with what it is in."""
    if isinstance(node, ast.If | ast.While):
        return node
    while isinstance(node, ast.Constant | ast.UnaryOp | ast.keyword | ast.Slice | ast.Tuple) and not isinstance(
        parents[id(node)], ast.stmt
    ):
        node = parents[id(node)]
    return parents[id(node)] if isinstance(node, ast.Constant | ast.UnaryOp) else node


def _one_line(before: str, after: str) -> str:
    """The first line in which the two differ: of a function or a loop the rest is the same."""
    pairs = zip(before.splitlines(), after.splitlines(), strict=True)
    old, new = next((old.strip(), new.strip()) for old, new in pairs if old != new)
    if len(old) > 140:  # a table, or the head of a function
        begin = max(0, next(i for i, pair in enumerate(zip(old, new, strict=False)) if len(set(pair)) == 2) - 40)
        old, new = f"… {old[begin : begin + 80]} …", f"… {new[begin : begin + 80]} …"
    return f"{old} → {new}"


def _function(node: ast.AST, parents: dict[int, ast.AST]) -> str:
    names = []
    while id(node) in parents:
        node = parents[id(node)]
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
    return ".".join(reversed(names)) or "module"


def _new(node: ast.AST, mutant: Mutant) -> ast.AST:
    """The node changed in place, or what is to stand there instead."""
    if mutant.how == "comparison":
        node.ops[mutant.link] = _COMPARISONS[type(node.ops[mutant.link])]()
    elif mutant.how == "operator":
        node.op = _OPERATORS[type(node.op)]()
    elif mutant.how == "and/or":
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif mutant.how == "constant":
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1
    elif mutant.how == "text":
        node.value = f"XX{node.value}"
    elif mutant.how == "condition":
        node.test = ast.UnaryOp(op=ast.Not(), operand=node.test)
    elif mutant.how == "returns None":
        node.value = ast.Constant(None)
    else:
        return ast.Pass() if mutant.how == "pass" else node.operand
    return node


def _replace(parent: ast.AST, old: ast.AST, new: ast.AST) -> None:
    for name, value in ast.iter_fields(parent):
        if value is old:
            setattr(parent, name, new)
        elif isinstance(value, list) and old in value:
            value[value.index(old)] = new


class Instead(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a tree rather than from its file."""

    def __init__(self, module: str, file: Path, tree: ast.Module) -> None:
        self.module, self.file, self.tree = module, file, tree

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name != self.module:
            return None
        return importlib.util.spec_from_loader(name, self, origin=str(self.file))

    def exec_module(self, module: object) -> None:
        module.__file__ = str(self.file)
        exec(compile(self.tree, str(self.file), "exec"), module.__dict__)


def tests_fail(file: str, tree: ast.Module | None, seconds: float) -> bool:
    """Run the tests of a file in a fork of this process, which has imported what takes long and nothing of ours.

    They fail, too, where they compute for more than `seconds`, or take ten times as long by the clock: other processes may be busy.
    """
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        status = 2
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            if tree is not None:
                module = "reasonscope." + file.removesuffix(".py").replace("/", ".")
                sys.meta_path.insert(0, Instead(module, ROOT / file, tree))
            import pytest

            status = int(
                pytest.main(
                    [
                        "-x",
                        "-q",
                        "--assert=plain",
                        "-p",
                        "no:cacheprovider",
                        *OTHER_PROCESSES,
                        *(str(ROOT / t) for t in TARGETS[file]),
                    ]
                )
            )
        finally:
            os._exit(status)
    deadline = time.monotonic() + 10 * seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) != 0
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


@dataclass(frozen=True, kw_only=True)
class Survivor:
    """A mutant that no test noticed: where, and what it changed."""

    file: str
    line: int
    what: str

    @property
    def reason(self) -> str | None:
        """Why no test can notice it, if that is known."""
        known = {_bare(what): why for what, why in REASONS.get(self.file, {}).items()}
        return known.get(_bare(self.what))


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Of one file: how many mutants there are and were tried, which survived, and the name of the sample."""

    file: str
    there: int
    tried: int
    sample: str
    survivors: tuple[Survivor, ...]

    @property
    def killed(self) -> int:
        return self.tried - len(self.survivors)

    @property
    def explained(self) -> int:
        return sum(survivor.reason is not None for survivor in self.survivors)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The mutants of a file that are tried, of `there` in all."""

    chosen: tuple[Mutant, ...]
    there: int

    @classmethod
    def of(cls, file: str, n: int, seed: int) -> "Sample":
        there = mutants(file)
        chosen = there if n >= len(there) else random.Random(f"{file} {seed}").sample(there, n)
        return cls(chosen=tuple(sorted(chosen, key=lambda mutant: (mutant.line, mutant.index))), there=len(there))

    @property
    def name(self) -> str:
        """The same for as long as the same changes would be tried."""
        whole = "\n".join(sorted(_bare(changed(mutant).what) for mutant in self.chosen))
        return hashlib.sha256(whole.encode()).hexdigest()[:8]


def _bare(what: str) -> str:
    """A change in words that stay the same when a name gets a leading underscore or loses it."""
    return re.sub(r"\b_+(?=\w)", "", what)


def judge(file: str, n: int, seed: int, before: Tally | None = None) -> Tally:
    """Try the mutants of a file; those alone that survived `before`, if the sample is the same."""
    sample = Sample.of(file, n, seed)
    left = {survivor.what for survivor in before.survivors} if before and before.sample == sample.name else None
    used = _children_computed()
    if tests_fail(file, None, 600):
        raise SystemExit(f"the tests of {file} fail without any mutant: {' '.join(TARGETS[file])}")
    limit = 3 * (_children_computed() - used) + 5
    survivors = []
    for mutant in sample.chosen:
        change = changed(mutant)
        if (left is None or change.what in left) and not tests_fail(file, change.tree, limit):
            survivors.append(Survivor(file=file, line=mutant.line, what=change.what))
            sys.stdout.write(f"  {file}:{mutant.line} {change.what}: {survivors[-1].reason or '?'}\n")
            sys.stdout.flush()
    return Tally(
        file=file, there=sample.there, tried=len(sample.chosen), sample=sample.name, survivors=tuple(survivors)
    )


def _children_computed() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def outcome(tallies: Sequence[Tally]) -> str:
    """In one sentence: what was killed of all that were tried, and of those that can be told from the original."""
    tried, killed, explained = (sum(getattr(t, name) for t in tallies) for name in ("tried", "killed", "explained"))
    return (
        f"{killed} of {tried} mutants killed ({killed / max(tried, 1):.1%}); of the {tried - killed} that survived, {explained} have a "
        f"reason below: {killed / max(tried - explained, 1):.1%} of the others are killed"
    )


def markdown(tallies: Sequence[Tally], n: int, seed: int) -> str:
    """The page; it names the files whose sample would be another today, and those that were not tried."""
    tried = {tally.file: tally for tally in tallies}
    stale = [f"`{t.file}`" for t in tallies if t.file in TARGETS and Sample.of(t.file, n, seed).name != t.sample]
    missing = [f"`{file}`" for file in TARGETS if file not in tried]
    lines = [
        "# Which mistakes the tests would notice", "",
        "A mutant is the code with one operator, comparison, constant, word, condition or returned value changed. It is killed where",
        "a test of its file fails or computes three times as long. Written by `make mutants`, from a random sample "
        f"(seed {seed}) of {sum(t.there for t in tallies)}:",
        f"{outcome(tallies)}.", "",
        f"Changed since, so that other mutants would be tried today: {', '.join(stale) or 'none'}.", "",
        f"Not tried yet: {', '.join(missing) or 'none'}.", "",
        "| file | mutants | tried | killed | survived with a reason | survived | sample |", "|---|---|---|---|---|---|---|",
        *(
            f"| `{t.file}` | {t.there} | {t.tried} | {t.killed} | {t.explained} | {t.tried - t.killed - t.explained} | {t.sample} |"
            for t in tallies
        ),
        "", "## Survivors", "",
        *(f"- `{s.file}:{s.line}` `{s.what}`: {s.reason or 'no test notices'}" for t in tallies for s in t.survivors),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def tallies_of(page: str) -> dict[str, Tally]:
    """What a page says of each file, in its order."""
    survivors: dict[str, list[Survivor]] = {}
    for file, line, what in re.findall(r"^- `([^`]+):(\d+)` `(.*?)`: ", page, re.MULTILINE):
        survivors.setdefault(file, []).append(Survivor(file=file, line=int(line), what=what))
    rows = re.findall(r"^\| `([^`]+)` \| (\d+) \| (\d+) \|.*\| (\w*) \|$", page, re.MULTILINE)
    return {
        file: Tally(
            file=file,
            there=int(there),
            tried=int(tried),
            sample=sample,
            survivors=tuple(survivors.get(file, ())),
        )
        for file, there, tried, sample in rows
    }


def _warm_up() -> None:
    """Do once what every fork would do again: imports, hypothesis's table of characters, and looking at all that for garbage."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    for name in SLOW_IMPORTS:
        importlib.import_module(name)
    from hypothesis import strategies

    strategies.characters(codec="utf-8").validate()
    strategies.text().validate()
    gc.collect()
    gc.freeze()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=12, help="Mutants of a file, at most.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="Files whose path holds this.")
    parser.add_argument(
        "--again", action="store_true", help="Only what survived on the page, if the sample is still the same."
    )
    parser.add_argument("--least", type=float, default=0.85, help="The share killed below which this fails.")
    parser.add_argument(
        "--out", type=Path, help="The page to write; with --only, the other files keep what it says of them."
    )
    given = parser.parse_args()
    _warm_up()
    tallies = []
    known = tallies_of(given.out.read_text(encoding="utf-8")) if given.out and given.out.exists() else {}
    for file in (file for file in TARGETS if given.only in file):
        tally = judge(file, given.sample, given.seed, known.get(file) if given.again else None)
        tallies.append(tally)
        sys.stdout.write(f"{file}: {tally.killed} of {tally.tried} killed\n")
        sys.stdout.flush()
    if given.out:
        kept = (known if given.only else {}) | {tally.file: tally for tally in tallies}
        page = markdown([kept[file] for file in TARGETS if file in kept], given.sample, given.seed)
        given.out.write_text(page, encoding="utf-8")
    sys.stdout.write(f"{outcome(tallies)}\n")
    killed = sum(t.killed for t in tallies)
    return 0 if killed >= given.least * sum(t.tried for t in tallies) else 1


if __name__ == "__main__":
    sys.exit(main())
