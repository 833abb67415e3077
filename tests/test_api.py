"""What the packages export: pinned lists of names, each documented, and nothing heavy imported by naming them."""

import ast
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
EXPORTS = {
    "reasonscope": """
        Estimate Head LinearProbe Message Model OpenRun Problem PromptOptions ReasonscopeError Recipe Result Sampling Scope
        Site SteeringVector Thinking Trace TraceStore analyse analyses analysis capture data from_hub generate import_jsonl
        load_model load_problems open_run probes push_to_hub read_plan record sentences show_progress steering steps study
        verify
    """,
    "reasonscope.data": """
        ArchitectureError ContextError CutTrace Estimate GPT_OSS InputError Message MissingExtraError
        ModelLoadError Problem ReasonscopeError Regions RunFolder Sampling Sentence SiteError Span Step
        StoreError THINK ThinkTags Trace TraceStore build_trace check_store cut_trace equivalent export_jsonl
        export_parquet export_thought_anchors extract_answer find_regions import_jsonl
        import_thought_anchors import_traces label_sentences load_problems sentences steps trace_from_text
    """,
    "reasonscope.probes": """
        BlockLayout Capture Check Comparison Completion CorrectnessReport DecodingStep Edit Forward Head Layout
        LengthReport LinearProbe LogisticProbe Model POINTS Positions ProbeReport RefusalReport RemainingReport
        RidgeProbe Site capture cluster_bootstrap continuations correctness expand_sites fit generate gradients
        grouped_predictions length load_model record refusal remaining replay rollouts run_with_cache verify
    """,
    "reasonscope.steering": """
        Ablation AblationEffect AdaptiveSteering Arm BudgetForcing BudgetGuidance Clamp CloseTag Composed
        Condition CyclicReflex DECODING_METHODS DecodingResponse Dose DoseResponse ExtractionData
        ForcedClose Intervention METHODS Method OPERATORS Recipe RecipePart Scope Steering SteeringExperiment SteeringVector
        SuppressTokens ThoughtSwitchPenalty TokenBias VectorUse ablation_effect as_intervention clamped
        cosine_table decoding_response dose_response extract orthogonalised patch
    """,
    "reasonscope.analysis": """
        ANALYSES AblationStudy Analysis Axis Band Result Study ablate activation_patching alternatives analyse
        anchors_of_trace attention_chain attention_map cliff_heads confidence_of_trace emergent_heads
        entropy_of_trace head_attribution head_effects head_plan head_table
        logit_lens mi_of_trace misalignment_of_trace named_heads probe_write_result receiver_scores receivers_of
        recycling_study reflection_of_trace replacement_effects resample signal_agreement steering_shift
        suppression_matrix token_suppression trajectory_of_trace vertical_scores
    """,
}
FEW = {package: sorted(names.split()) for package, names in EXPORTS.items()}


def exported(package: str) -> dict[str, object]:
    module = importlib.import_module(package)
    return {name: getattr(module, name) for name in FEW[package]}


@pytest.mark.parametrize("package", EXPORTS)
def test_exports_are_deliberate_and_few(package):
    module = importlib.import_module(package)
    assert sorted(module.__all__) == FEW[package]
    assert len(FEW[package]) <= 40
    assert set(FEW[package]) <= set(dir(module))


@pytest.mark.parametrize("package", EXPORTS)
def test_no_function_bears_the_name_of_its_module(package):
    """Otherwise `import reasonscope.probes.x as x` could give a function."""
    functions = {name: found.__module__ for name, found in exported(package).items() if inspect.isfunction(found)}
    assert {name for name, module in functions.items() if module.rpartition(".")[2] == name} == set()


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import reasonscope", {"torch", "numpy"}),
        ("import reasonscope as rs; rs.data, rs.probes, rs.steering, rs.analysis", {"torch", "numpy"}),
        ("import reasonscope as rs; rs.Site.parse('resid_post.2')", {"torch"}),
        ("import reasonscope as rs; rs.TraceStore, rs.Problem, rs.load_problems, rs.open_run", {"torch"}),
    ],
)
def test_names_are_imported_when_they_are_used(code, unwanted):
    printed = f"{code}; import sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", printed], capture_output=True, text=True, check=True).stdout.split()
    assert "reasonscope" in loaded
    assert set(loaded) & unwanted == set()


def test_the_reference_is_up_to_date():
    """`make docs` writes it again."""
    spec = importlib.util.spec_from_file_location("api_pages", ROOT / "docs" / "api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["api_pages"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    written = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md")}
    assert written == module.pages()


def sections(docstring: str) -> dict[str, str]:
    """The sections of a docstring in Google's form, by heading; "" holds what comes before the first."""
    found, heading = {"": ""}, ""
    for line in docstring.splitlines():
        if match := re.fullmatch(r"([A-Z]\w+):", line):
            heading = match[1]
            found[heading] = ""
        elif line and not line.startswith(" "):
            heading = ""
            found[heading] += f"{line}\n"
        else:
            found[heading] += f"{line}\n"
    return found


def example(text: str) -> ast.Module:
    """The code of an example, with or without the prompts of a session."""
    lines = [line.removeprefix("    ") for line in text.splitlines()]
    if any(line.startswith(">>>") for line in lines):
        lines = [line[4:] for line in lines if line.startswith((">>>", "..."))]
    return ast.parse("\n".join(lines))


def names_that_do_not_exist(tree: ast.Module) -> set[str]:
    """The attributes of `rs` in a piece of code that reasonscope does not have."""
    missing = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.fullmatch(r"rs(\.\w+)+", ast.unparse(node)):
            value: object = importlib.import_module("reasonscope")
            for part in ast.unparse(node).split(".")[1:]:
                if not hasattr(value, part):
                    missing.add(ast.unparse(node))
                    break
                value = getattr(value, part)
    return missing


def complaints(found: object) -> list[str]:
    """What the docstring of an exported function or class lacks."""
    docstring = inspect.getdoc(found) or ""
    there = sections(docstring)
    said = [] if there[""].strip() else ["a first line"]
    if inspect.isfunction(found):
        parameters = list(inspect.signature(found).parameters)
        described = re.findall(r"^    \*{0,2}(\w+):", there.get("Args", ""), flags=re.MULTILINE)
        said += [] if parameters == described else [f"Args in order, with {sorted(set(parameters) ^ set(described))}"]
        returned = str(inspect.signature(found).return_annotation)
        if not returned.endswith(("None", "Iterator[None]")):
            said += [] if "Returns" in there or "Yields" in there else ["Returns"]
    if "Example" in there:
        said += [f"{name}, which does not exist" for name in sorted(names_that_do_not_exist(example(there["Example"])))]
    elif inspect.isfunction(found):
        said += ["Example"]
    return said


@pytest.mark.parametrize("package", EXPORTS)
def test_every_exported_name_is_documented(package):
    documented = {
        name: found
        for name, found in exported(package).items()
        if not isinstance(found, ModuleType) and (inspect.isfunction(found) or inspect.isclass(found))
    }
    assert {name: said for name, found in documented.items() if (said := complaints(found))} == {}


def test_complaints_about_docstrings():
    def undocumented(a, *, b) -> int: ...

    def documented(a, *, b) -> int:
        """One line.

        Args:
            a: A number.
            b: Another.

        Returns:
            A third.

        Example:
            rs.load_problems("problems.jsonl")
        """

    def wrong(a) -> None:
        """One line.

        Args:
            b: Not a.

        Example:
            >>> rs.nothing.at_all
        """

    assert complaints(documented) == []
    assert complaints(undocumented) == ["a first line", "Args in order, with ['a', 'b']", "Returns", "Example"]
    assert complaints(wrong) == [
        "Args in order, with ['a', 'b']",
        "rs.nothing, which does not exist",
        "rs.nothing.at_all, which does not exist",
    ]
