"""Nested numbers become what JSON takes."""

import json

import numpy as np

from reasonscope.data.arrays import plain


def test_numpy_numbers_and_keys_become_pythons_own_and_what_json_lacks_becomes_none():
    given = {
        2: np.float32(0.5),
        "n": np.int64(3),
        "all": np.array([[1.0, np.nan], [np.inf, 2.0]]),
        "pair": (1, float("inf")),
    }
    found = plain(given)
    assert found == {"2": 0.5, "n": 3, "all": [[1.0, None], [None, 2.0]], "pair": [1, None]}
    assert json.loads(json.dumps(found, allow_nan=False)) == found and type(found["n"]) is int
