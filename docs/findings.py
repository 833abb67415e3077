"""Fill the table of findings from a study, and write it into docs/findings.md: `python docs/findings.py MODEL STUDY`; without arguments,
only write it."""

import sys
from pathlib import Path

from reasonscope.analysis.studies.claims import FINDINGS, filled, findings_table, read_findings, write_findings

PAGE = Path(__file__).parent / "findings.md"
START, END = "<!-- table: docs/findings.py -->", "<!-- end of the table -->"


def with_table(page: str) -> str:
    """The page with the table of today between its marks."""
    before, rest = page.split(START)
    return f"{before}{START}\n\n{findings_table(read_findings())}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    if len(sys.argv) == 3:
        write_findings(filled(read_findings(), sys.argv[1], sys.argv[2]), FINDINGS)
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
