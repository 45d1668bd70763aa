"""Reads and writes results files: JSON, one row of the table per line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def save(results: dict[str, Any], path: Path) -> None:
    """Writes beside `path`, then renames: a reader sees the old file or the new one, never a part."""
    header = json.dumps({key: value for key, value in results.items() if key != "rows"}, indent=1)
    rows = ",\n".join(json.dumps(row) for row in results["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(f'{header[:-2]},\n "rows": [\n{rows}\n]}}\n')
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(path.read_text())
    return results
