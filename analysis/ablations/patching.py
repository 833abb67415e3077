"""Activation patching from Python: two texts, a model, and the answers that tell them apart."""

from collections.abc import Sequence

from reasonscope.analysis.ablations.result_files import patching_result
from reasonscope.analysis.results import Result
from reasonscope.data.errors import InputError
from reasonscope.data.trace import Trace
from reasonscope.probes.models.model import Model
from reasonscope.steering.ablation.patching import At, PatchPair, patch_activations

Text = str | Sequence[int] | Trace


def activation_patching(
    model: Model,
    clean: Text,
    corrupted: Text,
    *,
    answers: tuple[str, str] | None = None,
    at: At = "resid_pre",
    last: int | None = None,
    unrelated: Sequence[Text] = (),
) -> Result:
    """Put states of a clean text into a corrupted one, place by place: how much of the clean text's answer comes back?

    Args:
        model: The model.
        clean: A text, its token ids, or a trace, which is read up to its final answer.
        corrupted: The same with another answer. Both are traces, or neither is.
        answers: For texts, how each goes on, such as (" 12", " 15"). The first token in which they differ is looked at.
        at: `resid_pre`, `resid_mid`, `resid_post`, `attn_out` or `mlp_out`, patched token by token; or `heads`, each at all tokens.
        last: Patch only the last so many tokens, counted from the end of either text; for texts that differ in length.
        unrelated: Other texts, whose states are patched in at the same places: the null is the range of what they give back.

    Returns:
        Axes (metric, layer, token) or (metric, layer, head), with the metrics `recovered logit difference`, `recovered probability`,
        `logit difference` and `probability`. Recovered is the share of the way from the corrupted to the clean text.

    Raises:
        InputError: If the tokens of the texts cannot be put side by side, the answers do not differ, or an unrelated text is too short.
        ContextError: If a text exceeds the model's context.

    Paper: Meng et al., arXiv 2202.05262, section 2; metrics as Zhang and Nanda, arXiv 2309.16042, section 2.

    Departures: the corrupted text is another prompt, not one with noise on its embeddings.

    Example:
        right, wrong = rs.open_run("runs/mine").store.trace("p1/0"), rs.open_run("runs/mine").store.trace("p1/1")
        result = rs.analysis.activation_patching(model, right, wrong, at="heads", last=8)
        result.at(metric="recovered logit difference")  # (layer, head)
    """
    if isinstance(clean, Trace) and isinstance(corrupted, Trace):
        pair = PatchPair.of_traces(clean, corrupted)
    elif isinstance(clean, Trace) or isinstance(corrupted, Trace):
        raise InputError("one of the two is a trace and the other a text; give two traces, or two texts with answers=")
    elif answers is None:
        raise InputError("texts need answers=, how each of them goes on, such as (' 12', ' 15')")
    else:
        pair = PatchPair.of_texts(model, _ids(model, clean), _ids(model, corrupted), answers)
    shared = [] if isinstance(clean, Trace) else pair.clean[len(_ids(model, clean)) :]
    others = [[*_ids(model, text), *shared] for text in unrelated]  # they too go on with what both answers begin with
    found = patch_activations(model, pair, at=at, last=last, unrelated=others)
    about = {"model": model.name, "at": at, "last": last, "unrelated": len(others)}
    return patching_result(model, found, pair, about)


def _ids(model: Model, text: Text) -> list[int]:
    if isinstance(text, str):
        return model.encode_text(text)
    return text.token_ids.tolist() if isinstance(text, Trace) else [int(one) for one in text]
