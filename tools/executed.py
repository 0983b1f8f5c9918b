"""Notebooks as the tests have run them: the build takes their outputs where nothing has changed since.

nbval executes every chapter, and so would a build after it. What it saw is kept under `_build/executed`, in a folder
named by the package, the lock and Python.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from tools.inputs import environment_fingerprint

SECONDS = "execution_seconds"
KINDS = {"display_data", "execute_result", "stream"}
WIDGET = "application/vnd.jupyter.widget-view+json"  # its state is the kernel's, which nbval does not ask for


def place(root: Path) -> Path:
    return root / "_build" / "executed" / environment_fingerprint(root)[:16]


def forget_others(root: Path) -> None:
    """Drop what was kept under another package, lock or Python."""
    now = place(root)
    for folder in now.parent.glob("*"):
        if folder != now:
            shutil.rmtree(folder, ignore_errors=True)


def keep(
    folder: Path,
    notebook: NotebookNode,
    name: str,
    outputs: Sequence[list[NotebookNode]],
    language: dict,
    seconds: float,
) -> bool:
    """Write what each code cell of a notebook gave; False, and nothing, where a build would show more than that."""
    found = [output for cell in outputs for output in cell]
    if any(output.output_type not in KINDS or WIDGET in output.get("data", {}) for output in found):
        return False
    notebook = copy.deepcopy(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, (cell, given) in enumerate(zip(cells, outputs, strict=True), start=1):
        cell.outputs, cell.execution_count = copy.deepcopy(list(given)), number
    notebook.metadata |= {"language_info": language, SECONDS: seconds}
    nbformat.validate(notebook)
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return True


def take(folder: Path, notebook: NotebookNode, name: str) -> tuple[NotebookNode, float] | None:
    """The notebook as it was executed, and the seconds it took; None where its cells were others."""
    path = folder / f"{name}.ipynb"
    if not path.is_file():
        return None
    executed = nbformat.read(path, as_version=4)
    cells = lambda nb: [(cell.cell_type, cell.source, cell.metadata) for cell in nb.cells]
    if cells(executed) != cells(notebook):
        return None
    return executed, executed.metadata.pop(SECONDS)
