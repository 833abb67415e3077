"""When vLLM closes the thinking, in JSON for the hook that does it: at a monitor's threshold, or by an exit rule without own passes."""

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from reasonscope.data.errors import InputError, SiteError
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.models.prompting import Prompting
from reasonscope.probes.vllm.steering import Look
from reasonscope.steering.engine.shipping import shipped
from reasonscope.steering.engine.worker import vocabulary_hash
from reasonscope.steering.exits.places import MASKS, Places
from reasonscope.steering.exits.rules import BUDGET, PROBE
from reasonscope.steering.exits.signals import closing_ids
from reasonscope.steering.recipes.controls import ControlPart, exit_probe
from reasonscope.steering.vectors.thinking import WrittenThinking
from reasonscope.steering.vectors.token_regions import ThinkTokenIds

_WORKER = "reasonscope.steering.engine.stop_worker"
_KINDS = ("execution", "reflection", "transition")


def exit_look(part: ControlPart, model: Prompting) -> Look:
    """The hook of an exit rule. Raises InputError for a rule that needs a pass of its own or the text, SiteError for another site."""
    told = part.settings
    if (rule := told["rule"]) not in (PROBE, BUDGET):
        raise InputError(
            f"the exit rule “{rule}” needs passes, answers or texts of its own at each place, which vLLM does not give a hook; use "
            f"“{PROBE}” or “{BUDGET}”, or --backend hooks"
        )
    probe = exit_probe(part) if rule == PROBE else None
    if probe is not None:
        check_probe(probe, model)
    places = Places.of(model, kind=told["kind"], every=told["every"])
    stop = stop_told(model, places.thinking, closing_ids(model), above=told["threshold"], places=places, rule=rule)
    return stop_look(
        f"stop by the exit rule “{rule}”", model.n_layers - 1 if probe is None else layer_of(probe, model), probe, stop
    )


def marks_told(model: Prompting, scopes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    marks = ThinkTokenIds.of(model)
    by_text = None if marks.by_text is None else asdict(marks.by_text)
    return {
        "opens": marks.opens,
        "closes": marks.closes,
        "separators": sorted(marks.separators),
        "newlines": sorted(marks.newlines),
        "blanks": sorted(marks.blanks),
        "by_text": by_text,
        "reads_text": by_text is not None or any(scope.get("steps") in _KINDS for scope in scopes),
        "vocabulary": vocabulary_hash(model.tokenizer_backend.get_vocab(with_added_tokens=True)),
    }


def check_probe(probe: LinearProbe, model: Prompting) -> None:
    """Raise InputError for a probe of another model, whose weights are on the server and are not compared."""
    named = {**model.fingerprint, "weights": probe.model.get("weights")}
    probe.check(probe.site, named)
    width = int(model.config.get_text_config().hidden_size)
    if len(probe.coef) != width:
        raise InputError(f"the probe reads {len(probe.coef)} numbers and the model has {width}; fit a new probe")


def layer_of(probe: LinearProbe, model: Prompting) -> int:
    """The layer whose output the probe reads. Raises SiteError for another site."""
    site = probe.site
    layer = {"resid_post": site.layer, "resid_pre": site.layer - 1}.get(site.point, -1)
    if not 0 <= layer < model.n_layers:
        raise SiteError(
            f"vLLM reads a probe at resid_post, and at resid_pre from layer 1, and not at {site}; use --backend hooks, or a probe there"
        )
    return layer


def stop_look(what: str, layer: int, probe: LinearProbe | None, stop: Mapping[str, Any] | None) -> Look:
    """The hook that reads a probe, if any, and stops, if it may."""
    coef = np.zeros(0) if probe is None else probe.coef
    told = {
        "coef": base64.b64encode(np.ascontiguousarray(coef, dtype="<f8").tobytes()).decode(),
        "intercept": 0.0 if probe is None else float(probe.intercept),
        "binary": probe is not None and probe.task == "binary",
        "stop": stop,
    }
    return Look(what=what, hook=partial(shipped, _WORKER, "StopHook", json.dumps(told)), post=(layer,))


def stop_told(
    model: Prompting,
    thinking: WrittenThinking,
    closing: Sequence[int],
    *,
    above: float,
    window: int = 1,
    places: Places | None = None,
    rule: str | None = None,
) -> dict[str, Any]:
    """When the thinking is closed, in JSON."""
    return {
        "above": above,
        "window": window,
        "closing": list(closing),
        "rule": rule,
        "thinking": _thinking_told(thinking, model),
        "places": None if places is None else _places_told(places),
    }


def _thinking_told(thinking: WrittenThinking, model: Prompting) -> dict[str, Any]:
    marks = None
    if thinking.marks is not None:
        by_text = None if thinking.marks.by_text is None else asdict(thinking.marks.by_text)
        marks = {**marks_told(model, ()), "opens": [], "closes": [], "by_text": by_text, "reads_text": True}
    plain = replace(thinking, marks=None)
    return {**asdict(plain), "marks": marks}


def _places_told(places: Places) -> dict[str, Any]:
    return {
        "kind": places.kind,
        "every": places.every,
        "vocabulary": len(places.ends),
        **{name: _packed(getattr(places, name)) for name in MASKS},
    }


def _packed(mask: Tensor) -> str:
    """A mask of the vocabulary in few characters, since it travels with each request."""
    return base64.b64encode(zlib.compress(np.packbits(mask.numpy()).tobytes())).decode()
