"""The build tool on a throwaway book: whatever is wrong fails the build and is named by chapter and cell."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools import executed
from tools.build import name_cell
from tools.inputs import environment_fingerprint
from tools.notebooks import KERNEL, normalise

ROOT = Path(__file__).parents[1]
TOC = "format: jb-book\nroot: book/index\nchapters:\n"


def write_chapter(folder, name, *cells):
    title = new_markdown_cell(f"# {name}")
    notebook = new_notebook(cells=[title, *cells], metadata={"kernelspec": dict(KERNEL)})
    nbformat.write(notebook, folder / "book" / f"{name}.ipynb")
    with (folder / "_toc.yml").open("a") as toc:
        toc.write(f"  - file: book/{name}\n")


def write_book(folder):
    """A book with the project's own configuration and no chapter yet."""
    for name in ("_config.yml", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    (folder / "book").mkdir()
    for name in ("_static", "_root"):
        shutil.copytree(ROOT / "book" / name, folder / "book" / name)
    (folder / "book" / "references.bib").write_text(
        "@book{known, author={A. Known}, title={T}, publisher={P}, year={2000}}\n"
    )
    (folder / "book" / "index.md").write_text("# A book\n\n{cite:t}`known`\n\n```{bibliography}\n```\n")
    (folder / "_toc.yml").write_text(TOC)
    (folder / "requirements.txt").write_text("numpy==2.0\n")
    (folder / "fisherbook").mkdir()
    (folder / "fisherbook" / "score.py").write_text("ONE = 1\n")


def build(folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tools.build", "--root", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    return result.returncode, result.stdout + result.stderr


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """One build of a book in which every page has something wrong; what it printed."""
    folder = tmp_path_factory.mktemp("broken")
    write_book(folder)
    write_chapter(folder, "reference", new_markdown_cell("See {numref}`fig-nowhere`."))
    write_chapter(folder, "role", new_code_cell("1 + 1"), new_markdown_cell("See {prf:ref}`thm-nowhere`."))
    write_chapter(folder, "page", new_markdown_cell("See {doc}`nowhere`."))
    write_chapter(folder, "link", new_markdown_cell("See [this](#nowhere)."))
    write_chapter(folder, "equation", new_markdown_cell("See {eq}`eq-nowhere`."))
    write_chapter(folder, "citation", new_markdown_cell("See {cite:t}`nobody1900`."))
    write_chapter(folder, "picture", new_markdown_cell("![A picture](nowhere.png)"))
    write_chapter(folder, "label", new_markdown_cell("(twice)=\n## One"), new_markdown_cell("(twice)=\n## Two"))
    for name in ("theorem_a", "theorem_b"):
        box = "```{prf:theorem} T\n:label: thm-twice\n\nText.\n```\n\n$$\n1\n$$ (eq-twice)"
        figure = new_code_cell("import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()")
        figure.metadata["mystnb"] = {"figure": {"name": "fig-twice", "caption": "A line."}, "image": {"alt": "A line."}}
        write_chapter(folder, name, new_markdown_cell(box), figure)
    return build(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chapter", "cell", "what"),
    [
        ("reference", 2, "fig-nowhere"),
        ("role", 3, "thm-nowhere"),
        ("page", 2, "nowhere"),
        ("link", 2, "nowhere"),
        ("equation", 2, "eq-nowhere"),
        ("citation", 2, "nobody1900"),
        ("picture", 2, "nowhere.png"),
        ("label", 3, "twice"),
        ("theorem_b", 2, "thm-twice"),
        ("theorem_b", 2, "eq-twice"),
        ("theorem_b", 3, "fig-twice"),
    ],
)
def test_what_is_wrong_is_named(broken, chapter, cell, what):
    code, output = broken
    assert code != 0
    where = f"book/{chapter}.ipynb, cell {cell}"
    lines = [line for line in output.splitlines() if line.startswith((f"{where},", f"{where}:"))]
    assert any(what in line for line in lines), output


@pytest.mark.slow
def test_a_chapter_that_raises_is_named(tmp_path):
    write_book(tmp_path)
    write_chapter(tmp_path, "good", new_code_cell("1 + 1"))
    write_chapter(tmp_path, "bad", new_code_cell("a = 1"), new_code_cell("# divide\na / 0"), new_code_cell("a"))
    code, output = build(tmp_path)
    assert code != 0
    assert "book/bad.ipynb, cell 3 (# divide): ZeroDivisionError: division by zero" in output
    assert not (tmp_path / "_build" / "html" / "index.html").exists()


@pytest.mark.slow
def test_runs_again_what_changed_and_no_more(tmp_path):
    write_book(tmp_path)
    write_chapter(tmp_path, "one", new_code_cell("1 + 1"))
    write_chapter(tmp_path, "two", new_code_cell("2 + 2"))
    code, output = build(tmp_path)
    assert (code, "2 of 2 executed pages to run" in output) == (0, True), output
    assert "[2/2]" in output
    assert f"file://{tmp_path}/_build/html/index.html" in output.splitlines()[-1]

    code, output = build(tmp_path)
    assert (code, "Nothing changed" in output) == (0, True), output

    path = tmp_path / "book" / "two.ipynb"
    path.write_text(path.read_text().replace("2 + 2", "3 + 3"))
    code, output = build(tmp_path)
    assert (code, "1 of 2 executed pages to run" in output) == (0, True), output

    (tmp_path / "fisherbook" / "score.py").write_text("ONE = 2\n")
    code, output = build(tmp_path)
    assert (code, "2 of 2 executed pages to run" in output) == (0, True), output


def test_takes_what_the_tests_have_executed(tmp_path):
    """A build shows the outputs that nbval saw of these very cells, and runs a chapter whose cells are others."""
    write_book(tmp_path)
    for name in ("same", "other"):
        write_chapter(tmp_path, name, new_code_cell(f"'run ' + 'by the build'  # {name}"))
    folder = executed.place(tmp_path)
    for name in ("same", "other"):
        notebook = nbformat.read(tmp_path / "book" / f"{name}.ipynb", as_version=4)
        if name == "other":
            notebook.cells[1].source += ", as it was"
        given = [[new_output("execute_result", {"text/plain": "seen by nbval"}, execution_count=1)]]
        assert executed.keep(folder, notebook, name, given, {"name": "python"}, 2.5)
    code, printed = build(tmp_path)
    assert code == 0, printed
    assert "1 of 2 executed pages to run" in printed
    pages = {name: (tmp_path / "_build" / "html" / "book" / f"{name}.html").read_text() for name in ("same", "other")}
    assert "seen by nbval" in pages["same"]
    assert "run by the build" in pages["other"]
    assert "seen by nbval" not in pages["other"]
    executed.forget_others(tmp_path)
    assert folder.is_dir()
    (tmp_path / "fisherbook" / "score.py").write_text("ONE = 2\n")
    assert executed.place(tmp_path) != folder
    executed.forget_others(tmp_path)
    assert not folder.exists()


@pytest.mark.parametrize(
    "output",
    [
        new_output("display_data", {executed.WIDGET: {"model_id": "1"}, "text/plain": "a bar"}),
        new_output("error", ename="E", evalue="", traceback=[]),
    ],
)
def test_leaves_to_the_build_what_nbval_does_not_see_whole(tmp_path, output):
    notebook = new_notebook(cells=[new_code_cell("1")])
    assert not executed.keep(tmp_path, notebook, "bar", [[output]], {"name": "python"}, 1.0)
    assert executed.take(tmp_path, notebook, "bar") is None


@pytest.mark.parametrize("change", ["fisherbook/score.py", "requirements.txt", "fisherbook/new.py"])
def test_package_and_lock_are_inputs_of_every_chapter(tmp_path, change):
    write_book(tmp_path)
    before = environment_fingerprint(tmp_path)
    (tmp_path / "book" / "index.md").write_text("# Other prose\n")
    assert environment_fingerprint(tmp_path) == before
    (tmp_path / change).write_text("# changed\n")
    assert environment_fingerprint(tmp_path) != before


def test_line_numbers_become_cells(tmp_path):
    complaint = f"{tmp_path}/book/score.ipynb:30004: WARNING: no such label"
    assert name_cell(complaint, tmp_path) == "book/score.ipynb, cell 3, line 4: WARNING: no such label"
    page = f"{tmp_path}/book/notation.md:7: WARNING: no such label"
    assert name_cell(page, tmp_path) == "book/notation.md, line 7: WARNING: no such label"


def test_normal_form_is_fixed_and_without_pictures():
    picture = nbformat.v4.new_output("display_data", data={"image/png": "iVBO", "text/plain": "<Figure>"})
    parts = [nbformat.v4.new_output("stream", name="stdout", text=text) for text in ("a\n", "b\n")]
    cell = new_code_cell("print('a')", outputs=[picture, *parts], execution_count=7)
    cell.metadata["execution"] = {"iopub.execute_input": "2026-11-21"}
    notebook = normalise(new_notebook(cells=[cell], metadata={"widgets": {}}), "cramer_rao")
    assert notebook.cells[0].outputs[0].data == {"text/plain": "<Figure>"}
    assert notebook.cells[0].outputs[1].text == "a\nb\n"
    assert notebook.cells[0].execution_count == 1
    assert notebook.cells[0].id == "cramer-rao-000"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    once = nbformat.writes(notebook)
    assert nbformat.writes(normalise(nbformat.reads(once, 4), "cramer_rao")) == once
    nbformat.validate(notebook)
