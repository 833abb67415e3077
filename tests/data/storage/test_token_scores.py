"""Scores of tokens come back as they were, and other files are refused."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from reasonscope.data.errors import InputError
from reasonscope.data.storage.token_scores import TokenScores, read_scores, save_scores

ABOUT = {"name": "length", "site": "resid_post.2", "unit": "tokens", "provenance": {"seed": 0}}
SCORES = {"b": np.array([0.5, -1.0], dtype=np.float32), "a": np.array([3.0], dtype=np.float32)}


def test_scores_come_back_as_they_were(tmp_path):
    path = tmp_path / "run" / "scores" / "length.safetensors"
    save_scores(TokenScores(scores=SCORES, about=ABOUT), path)
    found = read_scores(path)
    assert list(found.scores) == ["a", "b"]
    for id, scores in SCORES.items():
        np.testing.assert_array_equal(found.scores[id], scores, strict=True)
    assert found.about == {"format": "token scores", "version": 1, **ABOUT}
    assert list(read_scores(path, ["b"]).scores) == ["b"]
    assert not read_scores(path, []).scores
    with pytest.raises(InputError, match="no scores of 'x'"):
        read_scores(path, ["a", "x"])
    save_scores(TokenScores(scores={"c": SCORES["a"]}, about=ABOUT), path)
    assert list(read_scores(path).scores) == ["c"]


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (None, "no token scores of version 1"),
        ([1], "no token scores of version 1"),
        ({"format": "token scores", "version": 2, **ABOUT}, "no token scores of version 1"),
        ({"format": "other", "version": 1, **ABOUT}, "no token scores of version 1"),
        *(({"format": "token scores", "version": 1, **ABOUT, name: 3}, f"its {name} must be") for name in ABOUT),
    ],
)
def test_other_files_are_refused(about, message, tmp_path):
    save_file(SCORES, tmp_path / "x", metadata=None if about is None else {"reasonscope": json.dumps(about)})
    with pytest.raises(InputError, match=message):
        read_scores(tmp_path / "x")
