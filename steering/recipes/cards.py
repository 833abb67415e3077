"""The card of what is uploaded to the hub: what it is, how it was made, on which data, its controls and its limits."""

from collections.abc import Sequence

from reasonscope.data.storage.store import TraceStore
from reasonscope.data.summary import plural
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.steering.recipes.recipe import Recipe
from reasonscope.steering.recipes.summaries import made_from

_NOTHING = (
    "Nothing was given. Do not take an effect for granted: `reasonscope steer sweep` measures it beside random vectors."
)
_LIMITS = {
    "recipe": "It acts on the model that it was made for and on no other. An effect on other problems, lengths or samplings is not known.",
    "probe": "It reads one site of one model. What it says about other models, sites or kinds of problems is not known.",
    "store": "Traces are what one model wrote with one sampling. Check the licences of the model and of the problems before you use them.",
}


def card_of(found: Recipe | LinearProbe | TraceStore, repo_id: str, *, controls: str = "", limits: str = "") -> str:
    """The card in Markdown, with the metadata that the hub reads at its top."""
    kind, title, what, made, data = _told(found)
    model = _model_of(found)
    sections = {
        "What it is": what,
        "How it was made": made,
        "Data": data,
        "Controls": controls or (_NOTHING if kind == "recipe" else "Nothing was given."),
        "Limits": " ".join(text for text in (limits, _LIMITS[kind]) if text),
        "Use": f"```python\nimport reasonscope as rs\n\n{_use(kind, repo_id)}\n```",
    }
    body = "\n\n".join(f"## {name}\n\n{text}" for name, text in sections.items())
    return f"{_metadata(kind, model)}# {title}\n\n{body}\n"


def _told(found: Recipe | LinearProbe | TraceStore) -> tuple[str, str, str, str, str]:
    """Kind, title, and the first three sections."""
    if isinstance(found, Recipe):
        summary = found.summary()
        table = _table(summary.columns, summary.rows)
        made = f"It was {made_from(found)}. Content hash: `{found.hash}`."
        return "recipe", found.name, f"{summary.finding}\n\n{table}", made, _groups(found.provenance.get("groups", ()))
    if isinstance(found, LinearProbe):
        about = found.provenance
        what = (
            f"A linear probe ({found.method}, {found.task}) of {about.get('target', 'its target')} at `{found.site}`."
        )
        made = f"Fitted by reasonscope on {about.get('n', 'an unknown number of')} rows; `provenance` in the header has everything."
        return (
            "probe",
            f"Probe of {about.get('target', found.task)}",
            what,
            made,
            _groups(about.get("learned_from", ())),
        )
    about = found.meta
    steered = about.get("steered")
    by = f", steered by {steered['name']} (`{steered['hash']}`, `recipe.safetensors`)" if steered else ""
    what = f"{len(found)} reasoning traces{by}, with activations at {', '.join(found.sites) or 'no site'}."
    made = (
        f"Sampling: `{about.get('sampling', 'not known')}`. Every file is checked by the checksums in `manifest.json`."
    )
    groups = {trace.problem.group for trace in found}
    return "store", "Reasoning traces", what, made, f"{plural(len(groups), 'problem')}."


def _model_of(found: Recipe | LinearProbe | TraceStore) -> str:
    if isinstance(found, LinearProbe):
        return str(found.model.get("name") or "")
    known = (found.provenance if isinstance(found, Recipe) else found.meta).get("model") or {}
    return str(known.get("name") or "")


def _groups(groups: Sequence[str]) -> str:
    if not groups:
        return "It does not say which problems it was made from."
    return f"{plural(len(groups), 'problem')}, by their names in the header; judge it on others."


def _metadata(kind: str, model: str) -> str:
    """What the hub reads: tags, and the model if its name is one of the hub."""
    lines = ["tags:", "- reasonscope", f"- {kind}", "library_name: reasonscope"]
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        lines += [f"base_model: {model}"] if kind != "store" else []
    return "---\n" + "\n".join(lines) + "\n---\n\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _use(kind: str, repo_id: str) -> str:
    if kind == "store":
        return f'store = rs.from_hub("{repo_id}", kind="store", out="runs/theirs")'
    if kind == "probe":
        return f'probe = rs.from_hub("{repo_id}", kind="probe")'
    return f'recipe = rs.from_hub("{repo_id}")\nstore = rs.record(model, problems, "runs/steered", steer=recipe)'
