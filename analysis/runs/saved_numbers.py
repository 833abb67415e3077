"""What a measurement on a run saves next to its store: probes, numbers, and figures with their data."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reasonscope.data.arrays import plain
from reasonscope.data.errors import InputError
from reasonscope.data.storage.durable import make_folder, write_text_durably
from reasonscope.data.storage.run_folder import RunFolder
from reasonscope.data.storage.untrusted import parse_json

if TYPE_CHECKING:
    from reasonscope.analysis.figures import Figure
    from reasonscope.probes.properties.label_reports import AnyProbe


def save_numbers(
    where: RunFolder,
    name: str,
    numbers: Mapping[str, Any],
    *,
    command: str,
    seed: int,
    figures: "Mapping[str, Figure]",
    probes: "Mapping[str, AnyProbe] | None" = None,
) -> None:
    """Write RUN/numbers/NAME.json, and each probe and figure under its own name; what was there is replaced.

    `command` is the line that makes them again. A figure is written twice: as HTML that opens anywhere, and as JSON for the app.
    """
    from reasonscope.analysis.figures import to_html, write_figure

    for folder in (where.numbers, where.probes, where.figures):
        make_folder(folder)
    for probe_name, fitted in (probes or {}).items():
        fitted.save(where.probes / f"{probe_name}.safetensors")
    for figure_name, figure in figures.items():
        write_text_durably(where.figures / f"{figure_name}.html", to_html(figure, with_library=True))
        write_figure(figure, where.figures / f"{figure_name}.json")
    kept = {"command": command, "seed": seed, "figures": list(figures), "numbers": plain(numbers)}
    write_text_durably(where.numbers / f"{name}.json", json.dumps(kept, indent=1, allow_nan=False))


def read_numbers(path: Path) -> Mapping[str, Any]:
    """What `save_numbers` wrote: `command`, `seed`, `figures` and `numbers`. Raises InputError for a file that is not so."""
    try:
        kept = parse_json(path.read_bytes(), str(path))
    except (OSError, InputError) as error:
        raise InputError(f"{path} cannot be read as numbers of a run ({error}); measure again") from error
    if not isinstance(kept, dict) or not {"command", "seed", "figures", "numbers"} <= kept.keys():
        raise InputError(f"{path} holds no numbers of a run; measure again")
    return kept
