"""What the playground applies: recipes with their own tokens, and vectors that were saved alone on the tokens that the page names."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from reasonscope.analysis.figures import lengths_of_pairs
from reasonscope.analysis.runs.opened_run import open_run
from reasonscope.analysis.runs.saved_numbers import save_numbers
from reasonscope.app.demo.bundled import EXAMPLE
from reasonscope.app.page_parts.playground import label, mixed, vectors_of
from reasonscope.data.errors import InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.storage.manifest import RECIPE
from reasonscope.data.storage.run_folder import run_folder
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.recording import record
from reasonscope.probes.models.model import load_model
from reasonscope.steering import SteeringVector
from reasonscope.steering.recipes.controls import exit_part
from reasonscope.steering.recipes.recipe import Recipe, RecipePart

OLD = Path(__file__).parents[1] / "fixtures" / "written-before-the-move" / "steering" / "seal.safetensors"


def test_a_vector_that_was_saved_alone_acts_on_the_tokens_of_the_page():
    recipe = mixed({OLD: 2.0}, "where steps begin")
    (part,) = recipe.parts
    assert (part.scope, part.strength) == ({"on": "think", "steps": "separators"}, 2.0)
    assert mixed({OLD: 2.0}, "every token of the thinking").parts[0].scope == {"on": "think"}


def test_a_recipe_keeps_its_tokens_and_is_scaled(tmp_path):
    path = tmp_path / "half.recipe.safetensors"
    Recipe(name="half", parts=mixed({OLD: 0.5}, "where steps begin").parts).save(path)
    assert label(path) == "half"
    both = mixed({path: -2.0, OLD: 1.0, tmp_path / "off": 0.0}, "every token of the thinking")
    assert [(part.scope, part.strength) for part in both.parts] == [
        ({"on": "think", "steps": "separators"}, -1.0),
        ({"on": "think"}, 1.0),
    ]
    with pytest.raises(InputError, match="every vector has strength 0"):
        mixed({path: 0.0}, "where steps begin")


def test_what_has_no_strength_is_switched_on_or_off(tmp_path):
    run = tmp_path / "example"
    shutil.copytree(EXAMPLE, run)
    for file in (run / "steering").glob("*"):
        file.unlink()
    rule = run / "steering" / "exit.recipe.safetensors"
    Recipe(name="exit", controls=(exit_part("fixed budget", 3, kind="sentence", every=1),)).save(rule)
    Recipe(name="push", parts=mixed({OLD: 1.0}, "where steps begin").parts).save(
        rule.with_name("push.recipe.safetensors")
    )
    rule.with_name("torn.recipe.safetensors").write_bytes(b"torn")
    test = AppTest.from_function(_show, args=(str(run),), default_timeout=60).run()
    assert not test.exception and [(one.label, one.value) for one in test.toggle] == [("exit", True)]
    assert [one.label for one in test.slider][:2] == ["push, times its strength", "torn, times its strength"]
    assert mixed({rule: 1.0}, "where steps begin").hash == Recipe.load(rule).hash


def test_the_page_steers_by_the_recipe_of_a_run_and_says_how_many_tokens_were_edited(tmp_path):
    run = tmp_path / "example"
    shutil.copytree(EXAMPLE, run)
    for file in (run / "steering").glob("*"):
        file.unlink()
    drawn = np.random.default_rng(0).standard_normal(128).astype(np.float32)
    vector = SteeringVector(directions={Site("resid_post", 3): 300 * drawn}, method="by hand")
    Recipe(name="push", parts=(RecipePart(vector=vector),)).save(run / "steering" / "push.recipe.safetensors")
    shown = lengths_of_pairs(["a/0"], np.array([[9.0, 4.0]]), [(True, True)])
    save_numbers(
        run_folder(run), "compare", {"n_pairs": 1}, command="analyse compare", seed=0, figures={"compare": shown}
    )
    test = AppTest.from_function(_show, args=(str(run),), default_timeout=60).run()
    assert any("analyse compare" in str(one.value) for one in (*test.caption, *test.code, *test.markdown))
    assert [one.label for one in test.slider][:1] == ["push, times its strength"]
    test.number_input(key="longest").set_value(12)
    test.button[0].click().run()
    assert not test.exception and not test.error
    (said,) = [one.value for one in test.caption if "Edited:" in one.value]
    assert "KL of steered from base" in said and "part at generated token" in said


def test_a_steered_run_says_what_steered_it_and_offers_it(steered_run):
    test = AppTest.from_function(_show, args=(str(steered_run),), default_timeout=60).run()
    assert not test.exception and not test.error
    assert any(one.value.startswith("This run was steered by push") for one in test.markdown)
    assert [one.value for one in test.code] == [f"reasonscope analyse compare PLAIN {steered_run}"]
    assert [one.label for one in test.slider][:1] == ["what steered this run, times its strength"]
    assert vectors_of(open_run(steered_run)) == [steered_run / RECIPE]


@pytest.fixture
def steered_run(tmp_path):
    """A run of one trace that a recipe steered."""
    vector = SteeringVector(directions={Site("resid_post", 3): np.ones(128, dtype=np.float32)}, method="by hand")
    recipe = Recipe(name="push", parts=(RecipePart(vector=vector),))
    path = tmp_path / "steered"
    record(
        load_model("organism"), load_problems("ledger", n=1), path, sampling=Sampling(max_new_tokens=4), steer=recipe
    )
    return path


def _show(run: str) -> None:
    from pathlib import Path

    from reasonscope.analysis.runs.opened_run import open_run
    from reasonscope.app.pages import steering

    steering.show(open_run(Path(run)))
