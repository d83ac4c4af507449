"""Results as a table on the terminal and as JSON in benchmarks/results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def write(result: dict[str, Any], path: Path | None, suffix: str = "") -> Path:
    """Writes a result, which has "date" and "commit", to the path or to results/<date>-<commit><suffix>.json."""
    target = path or RESULTS / f"{result['date'][:10]}-{result['commit']}{suffix}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    return target


def newest(kind: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """The latest result of a kind ("decode", "host_overhead") in a folder, if there is one."""
    results = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return max((r for r in results if r["kind"] == kind), key=lambda r: str(r["date"]), default=None)


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, ["-" * width for width in widths], *rows):
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *others]))
