"""Whether two fingerprints are of the same model: paths, names and versions of libraries may differ."""

from collections.abc import Mapping, Sequence
from typing import Any

PARTS = ("architecture", "dtype", "weights", "tokenizer")  # of a fingerprint


def differences(there: Mapping[str, Any], here: Mapping[str, Any], parts: Sequence[str]) -> list[str]:
    """Those of `parts` in which the model `here` differs from what is known of the model `there`.

    The same weights in another dtype have other bytes, so they are not compared then, only the architecture.
    """
    dtypes = {told.get("dtype") for told in (there, here)} - {None}
    compared = parts if len(dtypes) < 2 else ["architecture", *(part for part in parts if part != "weights")]
    known = [part for part in dict.fromkeys(compared) if there.get(part) is not None]
    return [part for part in known if there[part] != here.get(part)]
