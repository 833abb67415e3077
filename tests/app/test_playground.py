"""What the playground applies: recipes with their own tokens, and vectors that were saved alone on the tokens that the page names."""

from pathlib import Path

import pytest

from reasonscope.app.page_parts.playground import label, mixed, vectors_in
from reasonscope.data.errors import InputError
from reasonscope.steering.recipes.recipe import Recipe

OLD = Path(__file__).parents[1] / "fixtures" / "written-before-the-move" / "steering" / "seal.safetensors"


def test_a_vector_that_was_saved_alone_acts_on_the_tokens_of_the_page():
    recipe = mixed({OLD: 2.0}, "where steps begin")
    (part,) = recipe.parts
    assert (part.scope, part.strength) == ({"on": "think", "steps": "separators"}, 2.0)
    assert mixed({OLD: 2.0}, "every token of the thinking").parts[0].scope == {"on": "think"}


def test_a_recipe_keeps_its_tokens_and_is_scaled(tmp_path):
    path = tmp_path / "half.recipe.safetensors"
    Recipe(name="half", parts=mixed({OLD: 0.5}, "where steps begin").parts).save(path)
    assert vectors_in(tmp_path) == [path] and label(path) == "half"
    both = mixed({path: -2.0, OLD: 1.0, tmp_path / "off": 0.0}, "every token of the thinking")
    assert [(part.scope, part.strength) for part in both.parts] == [
        ({"on": "think", "steps": "separators"}, -1.0),
        ({"on": "think"}, 1.0),
    ]
    with pytest.raises(InputError, match="every vector has strength 0"):
        mixed({path: 0.0}, "where steps begin")
