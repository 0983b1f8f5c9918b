"""The tables of the page "Benchmarks", from the file that `benchmarks/compare.py` writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

MARK = re.compile(r"<!-- benchmark (\w+) -->")
LOOP = 20  # products in a row


def fill(text: str, root: Path) -> str:
    """The text with a table in place of each comment `<!-- benchmark NAME -->`."""
    if not MARK.search(text):
        return text
    results = json.loads((root / "benchmarks" / "results.json").read_text(encoding="utf-8"))
    return MARK.sub(lambda match: table(match[1], results), text)


def table(name: str, results: dict[str, Any]) -> str:
    if name == "machine":
        return _machine(results)
    if name == "versions":
        return _versions(results)
    rows = results["tasks"][name]["rows"]
    if name == "inputs":
        return _inputs(rows)
    done = sorted((row for row in rows if "failed" not in row), key=lambda row: row["seconds"])
    heads, cells = _columns(name, done)
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    lines += [[_name(row), *(_number(cell(row)) for cell in cells)] for row in done]
    lines += [[_name(row), row["failed"], *[""] * (len(heads) - 2)] for row in rows if "failed" in row]
    most = max((row.get("processes", 1) for row in done), default=1)
    return _grid(lines) + (f"\n\nOf up to {most} processes for each row, the middle one." if most > 1 else "")


def _columns(name: str, rows: list[dict[str, Any]]) -> tuple[list[str], list[Any]]:
    """Headings, and functions from a row to a number, a text, or None."""
    seconds = lambda row: row["seconds"]
    first = lambda row: max(row["first"] - row["seconds"], 0.0)
    memory = lambda row: _megabytes(row.get("memory"))
    error = lambda row: None if row["error"] is None else f"{row['error']:.0e}"
    heads, cells = ["library", "seconds"], [seconds]
    if name == "training":
        heads, cells = ["library", "steps", "seconds"], [lambda row: str(row["steps"] or "more than 600"), seconds]
        return [*heads, "first run, s", "memory, MB"], [*cells, first, memory]
    if name.startswith("laplace"):
        parts = [lambda row, part=part: row[part] for part in ("fit", "evidence", "predict")]
        heads, cells = [*heads, "fit", "evidence", "predict"], [*cells, *parts]
        return [*heads, "first call, s", "memory, MB", "error"], [*cells, first, memory, error]
    calls = LOOP if name == "loop" else 1
    what = "$R^\\top R$" if name == "matrix" else "a gradient"
    heads, cells = [*heads, f"to {what}"], [*cells, lambda row: row["seconds"] / row["beside"] / calls]
    whole = lambda row: _megabytes(row["first_memory"])
    return [*heads, "MB", "first call, s", "first call, MB", "error"], [*cells, memory, first, whole, error]


def _inputs(rows: list[dict[str, Any]]) -> str:
    """One line for each function: seconds at every number of inputs, and the memory at the largest."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        function, n = row["name"].rsplit(", ", 1)
        found.setdefault(function, {})[int(n)] = row
    sizes = sorted(next(iter(found.values())))
    heads = ["", *(f"{n:,}".replace(",", "\N{NO-BREAK SPACE}") for n in sizes), "memory, MB"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for function, at in found.items():
        last = at[sizes[-1]]
        times = [_number(at[n].get("seconds")) for n in sizes]
        lines.append([function, *times, _megabytes(last.get("memory"))])
    return _grid(lines)


def _megabytes(memory: float | None) -> str:
    return "not measured" if memory is None else f"{memory:.0f}"


def _grid(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _machine(results: dict[str, Any]) -> str:
    """Where and when: of all tables at once, or of each machine and day which tables are its."""
    tasks: dict[tuple[str, str], list[str]] = {}
    for name, task in results["tasks"].items():
        tasks.setdefault((task["machine"], task["date"]), []).append(name.replace("_", " "))
    if len(tasks) == 1:
        ((machine, date),) = tasks
        return f"Measured on a virtual machine: {machine}, on {date}."
    lines = [["virtual machine", "measured on", "tables"], ["---"] * 3]
    return _grid(lines + [[machine, date, ", ".join(names)] for (machine, date), names in sorted(tasks.items())])


def _versions(results: dict[str, Any]) -> str:
    lines = ["| environment | versions |", "| --- | --- |"]
    for environment, versions in results["versions"].items():
        lines.append(f"| {environment} | {', '.join(f'{name} {version}' for name, version in versions.items())} |")
    return "\n".join(lines)


def _name(row: dict[str, Any]) -> str:
    return f"**{row['name']}**" if row["name"].startswith("fisherbook") else str(row["name"])


def _number(value: Any) -> str:
    """Three significant digits of a number, and texts as they are."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
