"""What a probe of a label shows: held out while it is fitted, and on traces that it is applied to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from reasonscope.data.arrays import Values
from reasonscope.data.intervals import Estimate
from reasonscope.data.summary import Summary, in_hundredths, plural
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.evaluation.comparison import Comparison
from reasonscope.probes.evaluation.metrics import Reliability
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.fitting.positions import Place
from reasonscope.probes.fitting.token_probes import TokenProbe
from reasonscope.probes.properties.report import probe_numbers, truncation_notes

ProbeKind = Literal["linear", "attention", "multi-max"]
AnyProbe: TypeAlias = LinearProbe | TokenProbe
_ENOUGH = 100  # rows of the negative class, from which on one false positive is allowed at 1 %


@dataclass(frozen=True, kw_only=True)
class _OfLabel:
    """What was predicted, and from how much: the part that both reports have."""

    label: str
    positive: str
    place: Place
    n_traces: int
    n_negative: int
    n_groups: int

    @property
    def predicted(self) -> str:
        """What is predicted, for a sentence."""
        return predicted_words(self.label, self.positive)

    def _of_label(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "positive": self.positive or None,
            "position": self.place.name,
            "n_traces": self.n_traces,
            "n_groups": self.n_groups,
        }


@dataclass(frozen=True, kw_only=True)
class LabelReport(_OfLabel):
    """How well a label is predicted from one place of a trace, on problems that the probe was not fitted on.

    Attributes:
        label: What the label is called.
        positive: The class that is predicted; empty for a regression.
        place: Where the probe reads.
        comparison: AUROC (classification) or Spearman (regression) of the probe and its baselines. `metrics` has the recall at 1 % false
            positives (`tpr_at_1_fpr`), the expected calibration error (`calibration_error`) and more.
        reliability: Held-out probabilities by what came of them; None for a regression.
        probe: The probe, fitted on all rows.
        kind: "linear", "attention" or "multi-max".
        sites: The sites that were read.
        by_layer: Score at each of `sites` on rows that were not fitted on, (layer,).
        counts: Number of traces of each class.
        n_rows: Rows that were learned from; several per trace for `every:N`.
        n_negative: Rows of the negative class.
        n_traces: Traces that were learned from.
        n_truncated: How many of them were cut off.
        n_left_out: Traces without a label or without the place.
        n_groups: Groups of problems.
    """

    comparison: Comparison
    reliability: Reliability | None
    probe: AnyProbe
    kind: ProbeKind
    sites: tuple[Site, ...]
    by_layer: Values
    counts: Mapping[str, int]
    n_rows: int
    n_truncated: int
    n_left_out: int

    def to_dict(self) -> dict[str, Any]:
        """Every number, for JSON."""
        return {
            **self._of_label(),
            "comparison": self.comparison.to_dict(),
            "kind": self.kind,
            "probe": probe_numbers(self.probe),
            "reliability": None
            if self.reliability is None
            else {key: getattr(self.reliability, key).tolist() for key in ("predicted", "share", "n")},
            "by_site": {str(site): float(score) for site, score in zip(self.sites, self.by_layer, strict=True)},
            "classes": dict(self.counts),
            "n_rows": self.n_rows,
            "n_truncated": self.n_truncated,
            "n_left_out": self.n_left_out,
        }

    def summary(self) -> Summary:
        """The finding for people, with the scores of the baselines."""
        classes = ", ".join(f"{n} {word}" for word, n in sorted(self.counts.items(), key=lambda item: -item[1]))
        left_out = f"; {self.n_left_out} without a label or this position are left out" if self.n_left_out else ""
        return Summary(
            finding=self.comparison.finding(self._subject, self.predicted),
            columns=self.comparison.columns,
            rows=self.comparison.rows(),
            notes=[
                f"{self.n_rows} rows of {plural(self.n_traces, 'trace')}{f' ({classes})' if classes else ''}{left_out}.",
                *_quality_notes(self.comparison.metrics, self.n_negative),
                *truncation_notes(
                    self.n_truncated, self.n_traces, "If the label depends on the cut, the probe may predict the cut"
                ),
            ],
        )

    @property
    def _subject(self) -> str:
        return self.place.words if self.kind == "linear" else f"A probe of all thinking tokens ({self.kind})"


def predicted_words(label: str, positive: str) -> str:
    """What is predicted, for a sentence."""
    return f"whether {label} is {positive!r}" if positive else label


def _quality_notes(metrics: Mapping[str, Estimate], n_negative: int) -> list[str]:
    """Recall at 1 % false positives and calibration, or R² of a regression."""
    if "r2" in metrics:
        return [f"R² {in_hundredths(metrics['r2'])}."]
    few = f" (none of {n_negative} rows may be one; label {_ENOUGH} or more)" if n_negative < _ENOUGH else ""
    return [
        f"Recall at 1 % false positives {in_hundredths(metrics['tpr_at_1_fpr'])}{few}.",
        f"Expected calibration error {in_hundredths(metrics['calibration_error'])}, Brier score {in_hundredths(metrics['brier'])}.",
    ]


@dataclass(frozen=True, kw_only=True)
class AppliedReport(_OfLabel):
    """How well a saved probe predicts a label on problems that it did not learn from.

    Attributes:
        label: What the label is called.
        positive: The class that is predicted; empty for a regression.
        place: Where the probe reads.
        metrics: AUROC, recall at 1 % false positives, calibration and more; or Spearman and R².
        n_traces: Traces that it was judged on.
        n_seen: Traces with a label whose problems it learned from; they are left out.
        n_negative: Rows of the negative class.
        n_groups: Groups of problems.
    """

    metrics: Mapping[str, Estimate]
    n_seen: int

    def to_dict(self) -> dict[str, Any]:
        """Every number, for JSON."""
        return {
            **self._of_label(),
            "metrics": {name: score.to_dict() for name, score in self.metrics.items()},
            "n_seen": self.n_seen,
        }

    def notes(self) -> list[str]:
        """What to print beside the scores of the tokens."""
        name = "auroc" if "auroc" in self.metrics else "spearman"
        score = f"{'AUROC' if name == 'auroc' else 'Spearman'} {in_hundredths(self.metrics[name])}"
        seen = f"; left out, of problems that it learned from: {plural(self.n_seen, 'trace')}" if self.n_seen else ""
        return [
            f"It predicts {self.predicted} with {score} on {plural(self.n_traces, 'trace')} of {self.n_groups} groups "
            f"of problems that it did not learn from{seen}.",
            *_quality_notes(self.metrics, self.n_negative),
        ]
