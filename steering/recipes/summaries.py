"""A recipe for people: what each part does, and what it was made from."""

from typing import TYPE_CHECKING

from reasonscope.data.summary import Summary, in_words, plural
from reasonscope.steering.recipes.description import operator_in_words, scope_in_words

if TYPE_CHECKING:
    from reasonscope.steering.recipes.recipe import Recipe, RecipePart


def recipe_summary(recipe: "Recipe") -> Summary:
    """One row per part, in the order in which they act."""
    rows = [_row(part) for part in recipe.parts]
    rows += [(control.name, "logits or prefill", "–", f"{control.value:g}", "–") for control in recipe.decoding]
    rows += [control.in_words() for control in recipe.controls]
    rows += [("prefill", "begins the thinking", "–", "–", "–")] if recipe.prefill else []
    counted = [
        (len(recipe.parts), "vector"),
        (len(recipe.decoding), "decoding method"),
        (len(recipe.controls), "controller"),
        (int(bool(recipe.prefill)), "prefill"),
    ]
    holds = " and ".join(plural(n, noun) for n, noun in counted if n)
    notes = [f"The thinking begins with {recipe.prefill!r}."] if recipe.prefill else []
    signs = dict.fromkeys(part.vector.sign for part in recipe.parts if part.vector.sign)
    notes += [f"A positive strength goes {sign}." for sign in signs]
    return Summary(
        finding=f"Recipe {recipe.name} (hash {recipe.hash}) holds {holds}, {made_from(recipe)}.",
        columns=("part", "acts on", "at", "strength", "norm"),
        rows=rows,
        notes=notes,
    )


def made_from(recipe: "Recipe") -> str:
    """`made by seal from 12 problems of runs/mine, for the model organism`."""
    about = recipe.provenance
    merged = " and ".join(one["name"] for one in about.get("merged", ()))
    method = f"merged from {merged}" if merged else f"made by {about.get('method') or 'hand'}"
    n, run = len(about.get("groups", ())), about.get("run")
    problems = f" from {plural(n, 'problem')}" if n else ""
    model = (about.get("model") or {}).get("name")
    return f"{method}{problems}{f' of {run}' if run else ''}{f', for the model {model}' if model else ''}"


def _row(part: "RecipePart") -> tuple[str, ...]:
    sites, norms = [str(site) for site in part.vector.directions], list(part.vector.norms.values())
    at = sites[0] if len(sites) == 1 else f"{sites[0]} to {sites[-1]} ({len(sites)})"
    norm = in_words(norms[0]) if len(norms) == 1 else f"{in_words(min(norms))} to {in_words(max(norms))}"
    return operator_in_words(part.operator), scope_in_words(part.scope), at, f"{part.strength:g}", norm
