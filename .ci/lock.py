"""Turn pip's report of an installation into a lock: every package with its version and the SHA-256 of the very file.

python -m pip install --dry-run --ignore-installed --quiet --report report.json --constraint constraints.txt '.[dev]'
python .ci/lock.py report.json > requirements.lock
"""

import json
import sys
from pathlib import Path

HEAD = """# Written by `make lock`, for Linux on x86-64, CPython 3.11 and the CPU build of torch: the files of `constraints.txt`, by hash.
# Installed by `make locked`. A constraints file cannot carry hashes where the project itself is installed: it has none.
"""


def main() -> None:
    report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    lines = []
    for item in report["install"]:
        name, version = item["metadata"]["name"], item["metadata"]["version"]
        if name == "reasonscope":
            continue
        digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{name.lower()}=={version} --hash=sha256:{digest}")
    sys.stdout.write(HEAD + "\n".join(sorted(lines)) + "\n")


if __name__ == "__main__":
    main()
