"""Which models are being edited: what is recorded from a model must say how it was steered, or the model must be plain."""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from reasonscope.data.errors import InputError

_ATTACHED: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()


@contextmanager
def attached(hf: PreTrainedModel) -> Iterator[None]:
    """Inside, `hf` counts as edited."""
    _ATTACHED[hf] = _ATTACHED.get(hf, 0) + 1
    try:
        yield
    finally:
        _ATTACHED[hf] -= 1


def is_attached(hf: PreTrainedModel) -> bool:
    """Whether something edits `hf`."""
    return _ATTACHED.get(hf, 0) > 0


def require_plain(hf: PreTrainedModel, doing: str) -> None:
    """Raise InputError if something is attached to `hf`: traces of an edited model would pass for those of the plain one."""
    if is_attached(hf):
        raise InputError(
            f"a steering vector is attached to the model; {doing} would mix steered traces with plain ones. "
            "Leave the `apply` block, or call `remove()` on the handle, first"
        )
