"""`reasonscope ablate`: remove parts of the model, or patch."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from reasonscope.app.commands.options import JsonOption, Load, ModelName, RunOption, grouped
from reasonscope.app.commands.show import show_summary
from reasonscope.app.interruption import keeping


class _How(StrEnum):
    """What `ablate` puts in the place of heads."""

    zero = "zero"
    mean = "mean"
    resample = "resample"


class _Part(StrEnum):
    """The tokens at which `ablate` removes heads."""

    all = "all"
    think = "think"
    answer = "answer"


@grouped
def ablate_command(
    run: RunOption,
    load: Load,
    plan: Annotated[
        Path | None, typer.Argument(help="A YAML file of ablations and patches; docs/methods/ablation.md shows one.")
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(
            help="Heads instead of a plan: do they matter? Written as 2.1,3.0 or as from:analyse/heads@top10, "
            "which takes the heads that an analysis of the run ranks highest."
        ),
    ] = None,
    how: Annotated[
        list[_How] | None, typer.Option(help="With --heads: what replaces them; may be repeated. By default all three.")
    ] = None,
    on: Annotated[_Part, typer.Option(help="With --heads: the tokens at which they are removed.")] = _Part.all,
    traces: Annotated[int | None, typer.Option(min=1, help="With --heads: traces to read; by default all.")] = None,
    problems: Annotated[
        int, typer.Option(min=0, help="With --heads: problems that the model without them answers again.")
    ] = 0,
    n_controls: Annotated[int, typer.Option(min=20, help="With --heads: random sets of as many other heads.")] = 20,
    n_matched: Annotated[
        int, typer.Option(min=0, help="With --heads: random directions that move each state as far.")
    ] = 20,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure everything again; by default what was measured before is kept.")
    ] = False,
    seed: Annotated[int, typer.Option(help="With --heads: random seed of the controls.")] = 0,
    model: ModelName = None,
    json_: JsonOption = False,
) -> None:
    """Does it matter causally? Remove heads, neurons, directions, tokens … or patch states, beside random ones of the same size.

    Writes into RUN/results: ablation (effects beside their controls), ablation_answers (what the ablated model wrote), patching.
    """
    from reasonscope.analysis.ablations.run import HOWS, ablate, ablate_heads
    from reasonscope.data.errors import InputError
    from reasonscope.data.storage.run_folder import run_folder

    if (plan is None) == (heads is None):
        raise InputError("give either the file of a plan or --heads, such as --heads from:analyse/heads@top10")
    kept = f"what was read is kept in {run_folder(run).results / 'cells'}; run the same command again to go on."
    numbers = {"traces": traces, "problems": problems, "n_controls": n_controls, "n_matched": n_matched, "seed": seed}
    with keeping(lambda: kept):
        if heads is None:
            assert plan is not None
            study = ablate(run, plan, model=model, fresh=fresh, **load)
        else:
            hows = [one.value for one in how or ()] or HOWS
            study = ablate_heads(run, heads, hows=hows, on=on.value, model=model, fresh=fresh, load={**load}, **numbers)
    shown = study.summaries(next_command=f"reasonscope app {run}  # then open http://127.0.0.1:8501/ablations")
    show_summary(shown, study.to_dict(), json_)
