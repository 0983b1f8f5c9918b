"""Build the book: execute what is stale, write the pages, name the culprit of whatever fails.

Usage: python -m tools.build [--root FOLDER]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import nbformat
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn, JupyterCacheAbstract
from myst_nb.core.read import is_myst_markdown_notebook, read_myst_markdown_notebook
from nbformat import NotebookNode

from tools import executed
from tools.inputs import book_fingerprint, documents, environment_fingerprint
from tools.notebooks import ChapterFailed, execute

# Sphinx counts lines of a notebook as 10000 x cell + line.
CELL_STRIDE = 10_000
LOCATION = re.compile(r"(?P<path>[^\s:]+\.(?:ipynb|md|py)):(?P<line>\d+)")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
PROOF_LOCATION = re.compile(r"(?P<stem>\S+)\.ip\.rst: (?P<what>.*?'(?P<label>[^']+)'.*)")
EXCEPTION = re.compile(r"[\w.]+(Error|Exception): .")
COMPLAINT = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b")


def build(root: Path) -> int:
    """Build the book under `root` into `_build/html`; 0 where it stands afterwards."""
    state = root / "_build" / "fingerprint"
    index = root / "_build" / "html" / "index.html"
    fingerprint = book_fingerprint(root)
    if index.is_file() and state.is_file() and state.read_text() == fingerprint:
        print("Nothing changed since the last build.")
        return _announce(index)

    state.unlink(missing_ok=True)
    cache = _fresh_cache(root)
    failures = _execute_stale(root, cache)
    if failures:
        print("\n".join(f"\n{failure}" for failure in failures), file=sys.stderr)
        return _give_up(f"{len(failures)} of the chapters raised")
    complaints = _write_pages(root)
    if complaints:
        print("\n".join(complaints), file=sys.stderr)
        return _give_up(f"{len(complaints)} complaints; all of Sphinx's output: _build/sphinx.log")
    if not index.is_file():
        return _give_up("Sphinx wrote no index.html; see _build/sphinx.log")
    state.write_text(fingerprint)
    return _announce(index)


def _fresh_cache(root: Path) -> JupyterCacheAbstract:
    """The execution cache, emptied where the package, the lock or Python changed.

    jupyter-cache itself keys on the notebook alone.
    """
    folder = root / "_build" / ".jupyter_cache"
    stamp = folder / "environment"
    environment = environment_fingerprint(root)
    if not stamp.is_file() or stamp.read_text() != environment:
        if folder.exists():
            print("The package, the lock or Python changed: every chapter runs again.")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        stamp.write_text(environment)
    return get_cache(folder)


def _execute_stale(root: Path, cache: JupyterCacheAbstract) -> list[str]:
    notebooks = list(_executable(root))
    stale = []
    folder = executed.place(root)
    executed.forget_others(root)
    for path, notebook in notebooks:
        if _is_cached(cache, notebook):
            continue
        if (known := executed.take(folder, notebook, path.stem)) is None:
            stale.append((path, notebook))
        else:
            _remember(cache, path, *known)
    if notebooks:
        print(f"{len(stale)} of {len(notebooks)} executed pages to run.", flush=True)
    failures = []
    workers = max(1, min(2, os.cpu_count() or 1))
    with ThreadPoolExecutor(workers) as pool:
        running = {pool.submit(execute, notebook, path): (path, notebook) for path, notebook in stale}
        for position, future in enumerate(as_completed(running), start=1):
            path, notebook = running[future]
            progress = f"[{position}/{len(stale)}] {path.stem}"
            try:
                seconds = future.result()
            except ChapterFailed as failure:
                failures.append(str(failure))
                print(f"{progress}  failed", flush=True)
                continue
            _remember(cache, path, notebook, seconds)
            print(f"{progress}  {seconds:.0f} s", flush=True)
    return failures


def _remember(cache: JupyterCacheAbstract, path: Path, notebook: NotebookNode, seconds: float) -> None:
    bundle = CacheBundleIn(notebook, str(path), data={executed.SECONDS: seconds})
    cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)


def _executable(root: Path) -> Iterator[tuple[Path, NotebookNode]]:
    for path in documents(root):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            yield path, nbformat.reads(text, as_version=4)
        elif is_myst_markdown_notebook(text):
            yield path, read_myst_markdown_notebook(text, path=path)


def _is_cached(cache: JupyterCacheAbstract, notebook: NotebookNode) -> bool:
    try:
        cache.match_cache_notebook(notebook)
    except KeyError:
        return False
    return True


def _write_pages(root: Path) -> list[str]:
    """Run Sphinx from scratch and return its complaints.

    From scratch, since a page that is not read again does not complain again.
    """
    for stale in ("html", ".doctrees", "jupyter_execute"):
        shutil.rmtree(root / "_build" / stale, ignore_errors=True)
    print("Writing the pages ...", flush=True)
    start = time.perf_counter()
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    command += ["build", str(root), "-n", "-W", "--keep-going", "--all"]
    # The local Sphinx extension is found from the root of the project.
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "NO_COLOR": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    output = COLOUR.sub("", result.stdout + result.stderr)
    (root / "_build" / "sphinx.log").write_text(output, encoding="utf-8")
    print(f"Writing the pages  {time.perf_counter() - start:.0f} s", flush=True)
    if result.returncode == 0:
        return []
    complaints = [line for line in output.splitlines() if COMPLAINT.search(line)]
    complaints = [line for line in complaints if "warnings treated as errors" not in line]
    # Without a warning, Sphinx itself or an extension raised: show the last thing said of each error.
    complaints = complaints or [line for line in output.splitlines() if EXCEPTION.match(line)]
    return [name_cell(line, root) for line in dict.fromkeys(complaints)] or [output[-4000:]]


def name_cell(complaint: str, root: Path) -> str:
    """`/.../book/score.ipynb:30004: WARNING` as `book/score.ipynb, cell 3, line 4: WARNING`."""

    def replace(match: re.Match[str]) -> str:
        path, line = Path(match["path"]), int(match["line"])
        if path.suffix == ".ipynb" and line >= CELL_STRIDE:
            return f"{_shown(path, root)}, cell {line // CELL_STRIDE}, line {line % CELL_STRIDE}"
        return f"{_shown(path, root)}, line {line}"

    proof = PROOF_LOCATION.match(complaint)
    if proof is None:
        return LOCATION.sub(replace, complaint, count=1)
    # sphinx-proof gives the page without the line, and the page's suffix wrong; the label leads to the cell.
    path = Path(proof["stem"] + ".ipynb")
    cell = _cell_that_names(path, proof["label"])
    return f"{_shown(path, root)}{cell}: {proof['what']}"


def _shown(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _cell_that_names(path: Path, label: str) -> str:
    if path.is_file():
        for number, cell in enumerate(nbformat.read(path, as_version=4).cells, start=1):
            if label in cell.source:
                return f", cell {number}"
    return ""


def _announce(index: Path) -> int:
    print(f"The book is at {index}")
    print(f"Open file://{index} in a browser, or run: make serve")
    return 0


def _give_up(reason: str) -> int:
    print(f"The book was not built: {reason}.", file=sys.stderr)
    return 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path.cwd())
    return build(parser.parse_args(arguments).root.resolve())


if __name__ == "__main__":
    sys.exit(main())
