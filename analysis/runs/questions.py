"""Which analyses there are: the question each one answers, its options, what it writes, and the page of the app that shows it.

Nothing heavy is imported here, so that `reasonscope --help` is fast; `registry` has the code that answers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from reasonscope.analysis.runs import options as told


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a run.

    Attributes:
        asks: The question, in one line.
        options: The class of its options.
        writes: The methods of the results that it writes, each with what they are; the first is what its finding is about.
        page: The page of the app that shows them.
    """

    asks: str
    options: type[told.AnalysisOptions]
    writes: Mapping[str, str]
    page: str

    @property
    def needs_model(self) -> bool:
        """Whether the analysis may load the model."""
        return issubclass(self.options, told.LoadsModel)


QUESTIONS: Mapping[str, Question] = {
    "mi": Question(
        asks="At which tokens does the hidden state depend most on the answer (MI peaks), and which words are these?",
        options=told.MiOptions,
        writes={"mi": "MI peaks"},
        page="mi-peaks",
    ),
    "anchors": Question(
        asks="Which sentences does the answer depend on? Rollouts from before each, or the importances published with a trace.",
        options=told.AnchorsOptions,
        writes={"anchors": "thought anchors", "replacement": "effects of replacing a sentence"},
        page="anchors",
    ),
    "receivers": Question(
        asks="Which heads look at a few sentences only (receiver heads), and which sentences are those?",
        options=told.ReceiversOptions,
        writes={
            "receivers": "receiver heads",
            "head_kurtosis": "how peaked each head is",
            "receiver_scores": "attention received",
        },
        page="heads",
    ),
    "suppression": Question(
        asks="What does each sentence owe to each earlier one? Hide it from later tokens and see what changes.",
        options=told.ReadsThroughModel,
        writes={"suppression": "suppression of sentences"},
        page="anchors",
    ),
    "heads": Question(
        asks="What does each head look at, what changes without it, and what do the end of the thinking and later tokens look back at?",
        options=told.HeadsOptions,
        writes={
            "heads": "attention heads",
            "head_effects": "next tokens without a head",
            "head_attribution": "written tokens without a head",
            "close_attention": "what the end of the thinking looks at",
            "recurrence": "tokens looked at again",
        },
        page="heads",
    ),
    "cliff": Question(
        asks="Which heads raise or lower the refusal probe at the end of the thinking, and what does the model do without them?",
        options=told.CliffOptions,
        writes={
            "probe_write": "heads that write refusal",
            "cliff": "the model without its cliff heads",
        },
        page="refusal",
    ),
    "emergent_heads": Question(
        asks="Which heads carry more in the reasoner than in its base model?",
        options=told.EmergentHeadsOptions,
        writes={"emergent_heads": "heads that the reasoning training added"},
        page="heads",
    ),
    "mi_compare": Question(
        asks="Do the reasoner's states depend more on the answer than its base model's, on the same traces?",
        options=told.MiCompareOptions,
        writes={"mi_compare": "MI of base and reasoner", "mi_base": "MI of the base model"},
        page="mi-peaks",
    ),
    "selection": Question(
        asks="Which of several samples is best trusted, and when can one stop?",
        options=told.SelectionOptions,
        writes={"selection": "rules that choose among samples"},
        page="overview",
    ),
    "misalignment": Question(
        asks="How much of the thinking would the base model have written otherwise?",
        options=told.MisalignmentOptions,
        writes={"misalignment": "tokens that the base model would not write"},
        page="trace",
    ),
    "trajectory": Question(
        asks="How far and how straight does the hidden state move during the thinking?",
        options=told.TrajectoryOptions,
        writes={"trajectory": "latent trajectory"},
        page="trace",
    ),
    "entropy": Question(
        asks="At which tokens was the model unsure, and at which words does the text fork?",
        options=told.ReadsThroughModel,
        writes={"entropy": "entropies and forking tokens"},
        page="trace",
    ),
    "confidence": Question(
        asks="When did the model know its answer? Forced answers at eleven cuts of the thinking.",
        options=told.ConfidenceOptions,
        writes={"confidence": "confidence along the thinking"},
        page="trace",
    ),
    "reflection": Question(
        asks="What does the thinking do after its first answer: confirm it, correct it or break it?",
        options=told.Seeded,
        writes={"reflection": "reflection"},
        page="trace",
    ),
    "alternatives": Question(
        asks="What else could have been written at each token, and how likely was what was written?",
        options=told.AlternativesOptions,
        writes={"alternatives": "alternatives at each token"},
        page="trace",
    ),
    "steering_shift": Question(
        asks="How does a steering vector change the probability of each token that was written?",
        options=told.SteeringShiftOptions,
        writes={"steering_shift": "tokens, steered less base"},
        page="trace",
    ),
    "attention_map": Question(
        asks="Where does each head look: at the prompt, at earlier sentences, or at its own?",
        options=told.AttentionMapOptions,
        writes={"attention_map": "where heads look"},
        page="heads",
    ),
    "agreement": Question(
        asks="Which sentences matter by every signal that was analysed before, and do the signals agree?",
        options=told.Seeded,
        writes={"agreement": "all signals side by side"},
        page="trace",
    ),
}


def analyses() -> dict[str, str]:
    """Every analysis that `analyse` runs, with the question that it answers.

    Returns:
        Name → question.

    Example:
        for name, question in analyses().items():
            print(name, question)
    """
    return {name: question.asks for name, question in QUESTIONS.items()}
