"""The report of a study: one HTML page that needs no network, each finding with its table of values and controls, and its figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment

from reasonscope.analysis.figures import Figure, read_figure, to_html
from reasonscope.analysis.studies.lab import Lab
from reasonscope.analysis.studies.state import Finished, finished
from reasonscope.data.storage.durable import write_text_durably
from reasonscope.data.summary import Summary, number_rows
from reasonscope.data.terminal_progress import spoken_time

REPORT = "report.html"
_MOST = 300  # numbers of a step on the page

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font-family: system-ui, sans-serif; color: #222; max-width: 1300px; margin: 2rem auto; padding: 0 1rem; }
figure { margin: 0; min-width: 0; overflow: hidden; }
.figures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem; }
@media (max-width: 800px) { .figures { grid-template-columns: minmax(0, 1fr); } }
.table { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { border-bottom: 1px solid #ddd; padding: 0.25rem 1rem 0.25rem 0; vertical-align: top; text-align: left; }
td + td { font-variant-numeric: tabular-nums; }
.about { color: #666; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ about }}</p>
{% if story %}<ol>
{% for line in story %}<li>{{ line }}</li>
{% endfor %}</ol>{% endif %}
{% for section in sections %}
<h2 id="{{ section.name }}">{{ section.name }}</h2>
<p class="about">{{ section.about }}</p>
{% for summary in section.summaries %}
<p><strong>{{ summary.finding }}</strong></p>
{% if summary.rows %}<div class="table"><table>
<tr>{% for column in summary.columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in summary.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% endif %}
{% for quote, said in summary.quotes %}<p>{{ said }}: <q>{{ quote }}</q></p>{% endfor %}
{% for note in summary.notes %}<p class="about">{{ note }}</p>{% endfor %}
{% endfor %}
{% if section.numbers %}<details><summary>Every number</summary><div class="table"><table>
{% for name, value in section.numbers %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</table></div>{% if section.more %}<p class="about">{{ section.more }} more are in steps/{{ section.name }}.json.</p>{% endif %}
</details>{% endif %}
{% if section.figures %}<div class="figures">
{% for figure in section.figures %}<figure>{{ figure|safe }}</figure>
{% endfor %}</div>{% endif %}
{% endfor %}
</body>
</html>
"""


@dataclass(frozen=True, kw_only=True)
class _Section:
    name: str
    about: str
    summaries: Sequence[Summary]
    figures: Sequence[str] = ()
    numbers: Sequence[tuple[str, str]] = ()
    more: int = 0


def write_report(lab: Lab, *, story: Sequence[str] = ()) -> Path:
    """Write OUT/report.html from what is kept of the steps, with a `story` before them."""
    drawn = _Drawn()
    sections = [
        _section(lab, name, known, drawn) for name in lab.plan.steps if (known := finished(lab, name)) is not None
    ]
    page = Environment(autoescape=True).from_string(_PAGE)
    path = lab.out / REPORT
    text = page.render(title=lab.plan.name, about=_about(lab), story=story, sections=sections)
    write_text_durably(path, text)
    return path


class _Drawn:
    """Draws figures; the first brings Plotly's script."""

    def __init__(self) -> None:
        self._n = 0

    def __call__(self, figure: Figure) -> str:
        self._n += 1
        return to_html(figure, with_library=self._n == 1)  # with the texts in it escaped


def _section(lab: Lab, name: str, known: Finished, drawn: _Drawn) -> _Section:
    if known.failed:
        return _Section(name=name, about="", summaries=[Summary(finding=f"Not measured: {known.failed}")])
    numbers = list(number_rows(known.numbers))
    return _Section(
        name=name,
        about=f"{lab.plan.steps[name].kind}: {spoken_time(known.seconds)}",
        summaries=known.summaries,
        figures=[drawn(read_figure(lab.out / path)) for path in known.figures],
        numbers=numbers[:_MOST],
        more=max(0, len(numbers) - _MOST),
    )


def _about(lab: Lab) -> str:
    told: Mapping[str, Any] = lab.plan.load
    loaded = f" ({', '.join(f'{key} {value}' for key, value in told.items())})" if told else ""
    return " ".join([lab.plan.about.strip(), f"Model: {lab.plan.model}{loaded}; seed {lab.plan.seed}."]).strip()
