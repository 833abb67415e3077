"""Rewrite PNG files with a palette of 128 colours, in a third of the bytes or less: `python docs/images/shrink.py FILE …`."""

import io
import sys
from pathlib import Path

from PIL import Image


def shrunk(png: bytes) -> bytes:
    """The same picture with a palette; one that has a palette already stays as it is."""
    picture = Image.open(io.BytesIO(png))
    if picture.mode == "P":
        return png
    made = io.BytesIO()
    picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(made, "PNG", optimize=True)
    return made.getvalue()


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_bytes(shrunk(path.read_bytes()))
