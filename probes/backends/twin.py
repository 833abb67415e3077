"""A model for an engine that rebuilds what it is given, so that the caller's own model stays as it was."""

from copy import deepcopy
from itertools import chain

from transformers import PreTrainedModel


def twin(hf: PreTrainedModel) -> PreTrainedModel:
    """A second set of modules over the very same parameters and buffers: no weight is copied, and a change to one shows in both."""
    shared = {id(tensor): tensor for tensor in chain(hf.parameters(), hf.buffers())}
    return deepcopy(hf, shared)
