"""The file of a recipe: directions as tensors, everything else as readable JSON in the header of the same file."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.errors import InputError
from reasonscope.data.storage.safetensors_file import SafetensorsFormat
from reasonscope.data.storage.untrusted import check_fields, wrap_errors
from reasonscope.probes.architecture.sites import Site
from reasonscope.steering.recipes.description import operator_in_words, scope_in_words
from reasonscope.steering.vectors.gguf import GGUF_FORMAT, MAGIC
from reasonscope.steering.vectors.vector import LEARNED, SteeringVector

if TYPE_CHECKING:
    from reasonscope.steering.recipes.controls import ControlPart
    from reasonscope.steering.recipes.recipe import Recipe, RecipePart

SUFFIX = ".recipe.safetensors"
_RECIPE_FORMAT = SafetensorsFormat(
    key="reasonscope.recipe",
    noun="recipe",
    version=1,
    fields={"name": str, "hash": str, "parts": list, "decoding": list, "prefill": str, "provenance": dict},
)
_PART = {
    "sites": list,
    "operator": dict,
    "scope": dict,
    "strength": float,
    "method": str,
    "norm": str,
    "provenance": dict,
}


def save(recipe: "Recipe", path: Path) -> None:
    """Write a recipe; see `Recipe.save`."""
    if path.suffix == ".gguf":
        _as_control_vector(recipe).save(path)
        return
    tensors = {
        f"part.{number}.{site}": direction
        for number, part in enumerate(recipe.parts)
        for site, direction in part.vector.directions.items()
    }
    tensors |= {
        f"control.{number}.{name}": tensor
        for number, control in enumerate(recipe.controls)
        for name, tensor in control.tensors.items()
    }
    _RECIPE_FORMAT.write(path, header_of(recipe), tensors)


def header_of(recipe: "Recipe") -> dict[str, Any]:
    """Everything but the directions, as JSON."""
    return {
        "name": recipe.name,
        "hash": recipe.hash,
        "parts": [_header(part, recipe.provenance) for part in recipe.parts],
        "decoding": [{"name": control.name, "value": control.value} for control in recipe.decoding],
        **({"controls": [_control_header(one) for one in recipe.controls]} if recipe.controls else {}),
        "prefill": recipe.prefill,
        "provenance": dict(recipe.provenance),
    }


def load(path: Path) -> "Recipe":
    """Read a recipe; see `Recipe.load`."""
    from reasonscope.steering.recipes.recipe import DecodingPart, Recipe, RecipePart

    if _starts_as_gguf(path):
        vector = SteeringVector.load(path)
        about = {key: vector.provenance[key] for key in (*LEARNED, "model") if key in vector.provenance}
        part = RecipePart(vector=vector)
        return Recipe(name=path.stem, parts=(part,), provenance={"method": vector.method, **about})
    header, tensors = _read(path)
    with wrap_errors(path):
        recipe = Recipe(
            name=header["name"],
            parts=tuple(_part(path, i, part, header["provenance"], tensors) for i, part in enumerate(header["parts"])),
            decoding=tuple(DecodingPart(name=one["name"], value=float(one["value"])) for one in header["decoding"]),
            controls=tuple(_control(path, i, one, tensors) for i, one in enumerate(header.get("controls", ()))),
            prefill=header["prefill"],
            provenance=header["provenance"],
        )
    if recipe.hash != header["hash"]:
        raise InputError(
            f"{path} says hash {header['hash']:.12} and holds {recipe.hash}: it was altered; restore it from a copy"
        )
    return recipe


def is_vector_file(path: Path) -> bool:
    """Whether the file holds a vector alone, as versions before recipes wrote it: without its tokens and operator."""
    try:
        GGUF_FORMAT.read(path)
    except InputError:
        return False
    return True


def _read(path: Path) -> tuple[Mapping[str, Any], Mapping[str, NDArray[Any]]]:
    try:
        return _RECIPE_FORMAT.read(path)
    except InputError as error:
        if path.is_file() and is_vector_file(path):
            raise InputError(
                f"{path} holds a vector alone, without the tokens and the operator that it acts with; "
                "extract it again to get a recipe, or use Recipe.of in Python"
            ) from error
        raise


def _header(part: "RecipePart", shared: Mapping[str, Any]) -> dict[str, Any]:
    """A part as JSON; what the recipe's provenance says already is named and not repeated."""
    vector = part.vector
    repeated = sorted(key for key, value in vector.provenance.items() if key in shared and shared[key] == value)
    return {
        "sites": [str(site) for site in vector.directions],
        "operator": dict(part.operator),
        "scope": dict(part.scope),
        "strength": float(part.strength),
        "method": vector.method,
        "norm": vector.norm,
        "sign": vector.sign,
        "provenance": {key: value for key, value in vector.provenance.items() if key not in repeated},
        "as_the_recipe": repeated,
    }


def _control_header(control: "ControlPart") -> dict[str, Any]:
    return {"name": control.name, "settings": dict(control.settings), "tensors": sorted(control.tensors)}


def _control(path: Path, number: int, header: Any, tensors: Mapping[str, NDArray[Any]]) -> "ControlPart":
    from reasonscope.steering.recipes.controls import ControlPart

    if not isinstance(header, dict):
        raise InputError(f"controller {number} of {path} is not a JSON object; restore the file from a copy")
    check_fields(header, {"name": str, "settings": dict, "tensors": list}, f"controller {number} of {path}")
    own = {name: tensors[f"control.{number}.{name}"] for name in header["tensors"]}
    return ControlPart(name=header["name"], settings=header["settings"], tensors=own)


def _part(
    path: Path, number: int, header: Any, shared: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
) -> "RecipePart":
    from reasonscope.steering.recipes.recipe import RecipePart

    if not isinstance(header, dict):
        raise InputError(f"part {number} of {path} is not a JSON object; restore the file from a copy")
    check_fields(header, _PART, f"part {number} of {path}")
    directions = {Site.parse(name): tensors[f"part.{number}.{name}"] for name in header["sites"]}
    if wrong := [str(site) for site, direction in directions.items() if direction.dtype != np.float32]:
        raise InputError(f"part {number} of {path}: {wrong[0]} is not float32; restore the file from a copy")
    about = {**header["provenance"], **{key: shared[key] for key in header.get("as_the_recipe", ())}}
    vector = SteeringVector(
        directions=directions,
        method=header["method"],
        norm=header["norm"],
        sign=header.get("sign", ""),
        provenance=about,
    )
    return RecipePart(vector=vector, operator=header["operator"], scope=header["scope"], strength=header["strength"])


def _as_control_vector(recipe: "Recipe") -> SteeringVector:
    """The recipe as one vector that is added to every token. Raises InputError that names what the format would lose."""
    lost = [f"{control.name} at {control.value:g}" for control in recipe.decoding]
    lost += [f"the controller {control.name}" for control in recipe.controls]
    lost += [f"the prefill {recipe.prefill!r}"] if recipe.prefill else []
    for number, part in enumerate(recipe.parts, start=1):
        if part.operator["name"] != "add":
            lost.append(f"the operator of part {number} ({operator_in_words(part.operator)})")
        if part.scope:
            lost.append(f"the tokens of part {number} ({scope_in_words(part.scope)})")
    if len({part.strength for part in recipe.parts}) > 1:
        lost.append("a strength for each part")
    layers = [site.layer for part in recipe.parts for site in part.vector.directions]
    if len(set(layers)) < len(layers):
        lost.append("several vectors at one layer")
    if lost or not recipe.parts:
        raise InputError(
            f"a GGUF control vector adds one vector per layer to every token and would lose: {'; '.join(lost) or 'everything'}. "
            f"Save it as {SUFFIX}"
        )
    first = recipe.parts[0]
    directions = {
        site: d * np.float32(first.strength) for part in recipe.parts for site, d in part.vector.directions.items()
    }
    unit = first.vector.norm if first.strength == 1 else "raw"
    about = {**first.vector.provenance, **recipe.learned, "recipe": {"name": recipe.name, "hash": recipe.hash}}
    sign = first.vector.sign if first.strength >= 0 else ""
    return SteeringVector(directions=directions, method=first.vector.method, norm=unit, sign=sign, provenance=about)


def _starts_as_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False  # the reader of the other format says what is wrong
