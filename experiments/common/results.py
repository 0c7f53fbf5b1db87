"""The files of an experiment's results: a record, its tables, its picture."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["write"]


def write(
    folder: Path, name: str, record: dict[str, Any], tables: str, draw: Callable[[dict[str, Any], Path], None]
) -> None:
    """Write ``name.json`` and ``name.md``, and draw ``name.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record) + "\n")
    (folder / f"{name}.md").write_text(tables)
    draw(record, folder / f"{name}.png")
