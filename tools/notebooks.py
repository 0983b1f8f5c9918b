"""Executing a chapter, and the normal form in which it is committed.

The normal form keeps the text that the tests compare and drops what would change from run to run:
no pictures (every build draws them afresh), no timings, no widget state, cell ids by position.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from tools.inputs import chapters

CELL_TIMEOUT = 300
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
# Kept from an output's data; everything else is a picture or state of a live kernel.
TEXT = {"text/plain", "text/html", "text/markdown", "text/latex"}
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class ChapterFailed(Exception):
    """A chapter raised; the message names it, the cell and the error."""


def execute(notebook: NotebookNode, path: Path) -> float:
    """Run every cell in place and return the seconds it took; raise `ChapterFailed` otherwise."""
    # The same numbers on a machine with an accelerator as on one without.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # The kernel inherits the environment, and shows no figure if it names another backend.
    os.environ.pop("MPLBACKEND", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        notebook,
        kernel_name=KERNEL["name"],
        timeout=CELL_TIMEOUT,
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],  # else each kernel prints a notice about its transport
        resources={"metadata": {"path": str(path.parent)}},
    )
    start = time.perf_counter()
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise ChapterFailed(_explain(notebook, path, error)) from None
    return time.perf_counter() - start


def normalise(notebook: NotebookNode, name: str) -> NotebookNode:
    """The committed form of an executed notebook; applying it twice changes nothing."""
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = NotebookNode(kernelspec=NotebookNode(KERNEL), language_info=NotebookNode(name="python"))
    count = 0
    for position, cell in enumerate(notebook.cells):
        cell.id = f"{name.replace('_', '-')[:56]}-{position:03d}"
        cell.metadata.pop("execution", None)
        cell.metadata.pop("trusted", None)
        cell.source = "\n".join(line.rstrip() for line in cell.source.strip("\n").split("\n"))
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            cell.outputs = _joined([_text_only(output, count) for output in cell.outputs])
    return notebook


def _text_only(output: NotebookNode, count: int) -> NotebookNode:
    if "data" in output:
        output.data = NotebookNode({k: v for k, v in sorted(output.data.items()) if k in TEXT})
        output.metadata = NotebookNode()
    if output.output_type == "execute_result":
        output.execution_count = count
    return output


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    # The kernel may send one print in several messages; where they break is chance.
    joined: list[NotebookNode] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last is not None and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def _explain(notebook: NotebookNode, path: Path, error: Exception) -> str:
    number, cell = _failing_cell(notebook)
    first = next((line for line in cell.source.splitlines() if line.strip()), "") if cell else ""
    where = f"{path.parent.name}/{path.name}, cell {number}"
    raised = [o for o in cell.outputs if o.output_type == "error"] if cell else []
    if raised:
        trace = COLOUR.sub("", "\n".join(raised[-1].traceback))
        return f"{where} ({first}): {raised[-1].ename}: {raised[-1].evalue}\n{trace}"
    reason = str(error).splitlines()[0] if str(error) else ""
    return f"{where} ({first}): {type(error).__name__}: {reason}"


def _failing_cell(notebook: NotebookNode) -> tuple[int, NotebookNode | None]:
    """The cell that raised, counted from 1 over all cells; else the last one that started."""
    started = (0, None)
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        if any(output.output_type == "error" for output in cell.outputs):
            return number, cell
        if started[1] is None or cell.execution_count is not None:
            started = (number, cell)
    return started


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Format, re-run and normalise the committed chapters.")
    parser.add_argument("chapter", nargs="*", help="names or paths; all chapters by default")
    parser.add_argument("--root", type=Path, default=Path.cwd())
    options = parser.parse_args(arguments)
    # A chapter need not be in the table of contents yet to be executed by name.
    paths = [_find(options.root, name) for name in options.chapter] or chapters(options.root)
    # The style that `make test` asks for; a cell that does not parse is reported when it runs.
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", *paths], check=False, stderr=subprocess.DEVNULL)
    for position, path in enumerate(paths, start=1):
        notebook = nbformat.read(path, as_version=4)
        try:
            seconds = execute(notebook, path)
        except ChapterFailed as error:
            print(f"[{position}/{len(paths)}] {path.stem}  failed\n{error}", file=sys.stderr)
            return 1
        text = nbformat.writes(normalise(notebook, path.stem)) + "\n"
        if text != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
        print(f"[{position}/{len(paths)}] {path.stem}  {seconds:.0f} s", flush=True)
    return 0


def _find(root: Path, name: str) -> Path:
    path = Path(name) if name.endswith(".ipynb") else root / "book" / f"{name}.ipynb"
    if not path.is_file():
        raise SystemExit(f"no such chapter: {path}")
    return path.resolve()


if __name__ == "__main__":
    sys.exit(main())
