"""A twin of a model, for engines that rebuild the model they are given: the caller's own stays as it was."""

from copy import deepcopy
from itertools import chain

from transformers import PreTrainedModel


def twin(hf: PreTrainedModel) -> PreTrainedModel:
    """A second set of modules over the same parameters and buffers: nothing is copied, and a change to a weight shows in both."""
    shared = {id(tensor): tensor for tensor in chain(hf.parameters(), hf.buffers())}
    return deepcopy(hf, shared)
