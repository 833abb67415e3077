"""The page that `reasonscope app` serves: one run's summary and report."""

import sys
from pathlib import Path

import streamlit as st

from reasonscope.app.summary import REPORT, read_summary, rows


def page(run: Path) -> None:
    """Show the run in the folder `run`."""
    st.set_page_config(page_title=f"reasonscope: {run.name}", layout="wide")
    st.title(f"Run {run.name}")
    st.table([{"number": name, "value": value} for name, value in rows(read_summary(run))], hide_index=True)
    report = run / REPORT
    if report.is_file():
        st.iframe(report)
    else:
        st.info(f"{report} is not there: the run has no report.")


if __name__ == "__main__":
    page(Path(sys.argv[1]))
