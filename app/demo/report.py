"""The report of a run as one HTML file that needs no network."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from reasonscope.analysis.figures import Figure, to_html
from reasonscope.app.demo.summary import REPORT, summary_rows
from reasonscope.data.storage.durable import write_text_durably

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font-family: system-ui, sans-serif; color: #222; max-width: 1300px; margin: 2rem auto; padding: 0 1rem; }}
figure {{ margin: 0; min-width: 0; overflow: hidden; }}
.figures {{ display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem; }}
@media (max-width: 800px) {{ .figures {{ grid-template-columns: minmax(0, 1fr); }} }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
td {{ border-bottom: 1px solid #ddd; padding: 0.25rem 1rem 0.25rem 0; vertical-align: top; }}
td + td {{ font-variant-numeric: tabular-nums; }}
</style>
</head>
<body>
<h1>{title}</h1>
<ol>
{story}
</ol>
<div class="figures">
{figures}
</div>
<h2>Every number</h2>
<table>
{rows}
</table>
</body>
</html>
"""


def write_report(out: Path, summary: Mapping[str, Any], figures: Sequence[Figure]) -> Path:
    """Write `out`/report.html: the story of the run, the figures in order, and every number of the summary."""
    drawn = "\n".join(
        f"<figure>{to_html(figure, with_library=index == 0)}</figure>" for index, figure in enumerate(figures)
    )
    story = "\n".join(f"<li>{escape(line)}</li>" for line in summary.get("story", ()))
    numbers = {name: value for name, value in summary.items() if name != "story"}
    table = "\n".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in summary_rows(numbers)
    )
    path = out / REPORT
    page = _PAGE.format(title=escape(f"Run {out.name}"), story=story, figures=drawn, rows=table)
    write_text_durably(path, page)
    return path
