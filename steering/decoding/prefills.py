"""Texts that a method writes right after the opening tag, as the begin of the thinking: for `rollouts(…, prefill=…)`."""

from types import MappingProxyType

from reasonscope.data.errors import InputError
from reasonscope.probes.models.model import Model

# As published. `</think>` stands for the model's own closing tag; the template has already written the opening tag and its newline.
_PREFILLS = MappingProxyType(
    {
        "nothinking": "Okay, I think I have finished thinking.\n</think>\n\n",  # arXiv 2504.09858
        "autothink": "...\n",  # arXiv 2505.10832: the model thinks, or closes at once
        "zerothink": "\n</think>",  # these two: SafeChain, arXiv 2502.12025
        "lessthink": "Okay, the user ask for this, I can answer it without thinking much.\n</think>\n",
        "safepath": "Let's think about safety first.",  # arXiv 2505.14667, zero-shot
    }
)
PREFILLS = tuple(_PREFILLS)


def prefill(name: str, model: Model) -> str:
    """Return the text of a prefill method with the tags of `model`.

    Reasoning in the open has no closing tag, so a blank line stands for it. Raises InputError if it is not one of PREFILLS.
    """
    if name not in _PREFILLS:
        raise InputError(f"no prefill is called {name!r}; choose one of {', '.join(PREFILLS)}")
    return _PREFILLS[name].replace("</think>", model.tags.close if model.tags else "")
