"""Completions of vLLM in groups, each after a check that the same model still answers."""

import time
from collections.abc import Iterator, Sequence

from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.vllm.identity import Watch
from reasonscope.probes.vllm.writer import VllmWriter, Written

# A group is checked after so many seconds, or so many bytes of activations; only an unchecked group is lost when the engine dies.
_SECONDS, _BYTES = 20.0, 32 * 2**20


def verified(
    writer: VllmWriter,
    watch: Watch,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    sites: Sequence[Site],
) -> Iterator[list[Written]]:
    """All completions, in groups. What was written around a restart of the server is asked for again.

    Raises StoreError as soon as another model answers, and everything that `VllmWriter.stream` raises.
    """
    left = list(range(len(prompts)))
    while left:
        given: set[int] = set()
        for group in _groups(writer.stream([prompts[i] for i in left], sampling, [seeds[i] for i in left], sites)):
            if watch.restarted():
                continue
            named = [(left[i], done, states) for i, done, states in group]
            given |= {i for i, _, _ in named}
            yield named
        left = [i for i in left if i not in given]


def _groups(written: Iterator[Written]) -> Iterator[list[Written]]:
    group: list[Written] = []
    size, since = 0, time.monotonic()
    for one in written:
        group.append(one)
        size += sum(states.nbytes for states in one[2].values())
        if size >= _BYTES or time.monotonic() - since >= _SECONDS:
            yield group
            group, size, since = [], 0, time.monotonic()
    if group:
        yield group
