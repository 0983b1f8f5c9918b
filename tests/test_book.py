"""The book's lint: the contract of a chapter, and that prose, package and tables name the same things."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

import fisherbook
from tools.book_extension import address, chapter_table, derived_in, mend_backlinks, public_names
from tools.inputs import chapters, documents
from tools.notebooks import normalise

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if path.stem != "index"]
SECTIONS = [
    "What you will be able to do",
    "Pitfalls",
    "Exercises",
    "Summary",
    "Sources and further reading",
]
SETUP = """import sys

if "google.colab" in sys.modules:
    %pip install --quiet "fisherbook[{extras}]=={version}" scikit-learn statsmodels"""
DOWNLOADS = re.compile(r"urllib|requests\.|fetch_\w+\(|get_rdataset|https?://")
TIMINGS = re.compile(r"%%?time|perf_counter|timeit|time\.time\(")
ADDRESS_OF_OBJECT = re.compile(r"0x[0-9a-f]{6,}")
MACRO = re.compile(r"\\(newcommand|renewcommand|DeclareMathOperator|def)\b")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook):
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def python(cell):
    """The cell as Python: without the lines that only IPython reads."""
    lines = ("pass" if re.match(r"\s*[%!]", line) else line for line in cell.source.splitlines())
    # `pass` takes the indentation of what it stands for.
    indents = (re.match(r"\s*", line).group() for line in cell.source.splitlines())
    return "\n".join(i + x if x == "pass" else x for i, x in zip(indents, lines, strict=True))


def outputs(notebook):
    return [(cell, output) for cell in code_cells(notebook) for output in cell.outputs]


def text_of(output):
    return output.get("text", "") + "".join(str(value) for value in output.get("data", {}).values())


# ---- the whole book ----


def test_links_from_source_pages_go_where_the_name_is_documented():
    documented = {"fisherbook.laplace", "fisherbook.operators.base.Fisher.solve"}
    body = '<a href="../../book/api.html#fisherbook.{}">[docs]</a>'
    full, short = body.format("operators.base.Fisher.solve"), body.format("Fisher.solve")
    assert mend_backlinks(short, "fisherbook.operators.base", documented) == full
    for kept in (body.format("laplace"), body.format("Fisher.nowhere")):
        assert mend_backlinks(kept, "fisherbook.operators.base", documented) == kept


def test_the_tables_of_chapters_agree():
    """Files, `_toc.yml` and `chapters.yml` list the same chapters, in the same order."""
    in_toc = [path.stem for path in chapters(ROOT) if path.stem != "index"]
    assert in_toc == list(chapter_table())
    assert sorted(in_toc) == [path.stem for path in CHAPTERS]


def test_every_public_name_has_one_chapter_that_derives_it():
    listed = [name for row in chapter_table().values() for name in row["derives"]]
    assert len(listed) == len(set(listed)), "a name is derived in two chapters"
    assert set(listed) == set(public_names()), "book/chapters.yml and the package's public names differ"


@pytest.mark.parametrize("name", public_names())
def test_public_name_occurs_in_its_chapter(name):
    notebook = read(ROOT / "book" / f"{derived_in()[name]}.ipynb")
    code = "\n".join(cell.source for cell in code_cells(notebook))
    assert re.search(rf"\b{name}\b", code), f"{name} is derived in {derived_in()[name]} but not used there"


def test_versions_agree():
    version = fisherbook.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert project["version"] == version == str(citation["version"])
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"=={version}" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_public_address_stands_in_one_place():
    hosts = [re.sub(r"https?://(github\.com/)?", "", url) for url in address().values()]
    for host in hosts:
        found = subprocess.run(
            ["git", "grep", "-l", "--fixed-strings", host],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert set(found.stdout.split()) <= {"pyproject.toml"}, f"{host} stands in a second place"


def test_every_page_is_in_the_table_of_contents():
    pages = {path for path in (ROOT / "book").glob("*.md") if path.name != "LICENSE.md"} | set(NOTEBOOKS)
    assert pages <= set(documents(ROOT))


# ---- every notebook, the first page included ----


@each_notebook
def test_is_in_normal_form(path):
    text = nbformat.writes(normalise(read(path), path.stem)) + "\n"
    assert text == path.read_text(encoding="utf-8"), f"run: make execute CHAPTER={path.stem}"


@each_notebook
def test_was_executed_in_order(path):
    # nbval does not compare a cell without a count, so a stripped notebook would pass unseen.
    cells = code_cells(read(path))
    raw = [cell.execution_count for cell in cells]
    assert all(cell.source.strip() for cell in cells), "an empty code cell"
    assert raw == list(range(1, len(cells) + 1)), f"run: make execute CHAPTER={path.stem}"
    prints = [cell for cell in cells if re.search(r"^print\(", cell.source, re.MULTILINE)]
    assert all(cell.outputs for cell in prints), "a cell prints but has no output: it was stripped"


@each_notebook
def test_outputs_are_text_that_lasts(path):
    for cell, output in outputs(read(path)):
        where = f"{path.stem}, cell {cell.execution_count}"
        assert output.output_type != "error", f"{where}: an error output"
        assert output.get("name") != "stderr", f"{where}: output on stderr: {text_of(output)[:200]}"
        assert not [kind for kind in output.get("data", {}) if kind.startswith(("image/", "application/"))], where
        assert not ADDRESS_OF_OBJECT.search(text_of(output)), f"{where}: the address of an object"


@each_notebook
def test_code_neither_times_nor_downloads(path):
    for cell in code_cells(read(path)):
        where = f"{path.stem}, cell {cell.execution_count}"
        assert not TIMINGS.search(cell.source), f"{where}: a timing"
        assert not DOWNLOADS.search(cell.source), f"{where}: a download"


@each_notebook
def test_setup_cell(path):
    first = read(path).cells[0]
    assert first.cell_type == "code"
    assert {"setup", "remove-cell"} <= set(first.metadata.get("tags", []))
    extras = "plot,arviz" if any("diagnose(" in cell.source for cell in code_cells(read(path))) else "plot"
    assert first.source == SETUP.format(extras=extras, version=fisherbook.__version__)


@each_notebook
def test_runs_in_float64(path):
    sources = [cell.source for cell in code_cells(read(path))]
    assert any('jax.config.update("jax_enable_x64", True)' in source for source in sources)


@each_notebook
def test_figures_have_number_caption_and_alt_text(path):
    names = []
    for cell in code_cells(read(path)):
        figures = [o for o in cell.outputs if "<Figure" in o.get("data", {}).get("text/plain", "")]
        if not figures:
            continue
        where = f"{path.stem}, cell {cell.execution_count}"
        metadata = cell.metadata.get("mystnb", {})
        figure, image = metadata.get("figure", {}), metadata.get("image", {})
        assert len(figures) == 1, f"{where}: one figure to a cell"
        assert figure.get("name", "").startswith(f"fig-{path.stem.replace('_', '-')}"), f"{where}: name"
        assert len(figure.get("caption", "")) >= 30, f"{where}: a caption that states the conclusion"
        assert len(image.get("alt", "")) >= 30, f"{where}: alt text"
        names.append(figure["name"])
    assert len(names) == len(set(names))


@each_notebook
def test_pictures_in_prose_have_alt_text(path):
    text = prose(read(path))
    assert not re.search(r"!\[\]\(", text)
    for block in re.findall(r"```\{(?:figure|image)\}.*?```", text, re.DOTALL):
        assert ":alt:" in block, f"{path.stem}: {block.splitlines()[0]}"


@each_notebook
def test_formulas_need_no_macros(path):
    assert not MACRO.search(prose(read(path))), "JupyterLab and Colab would not know the macro"


# ---- every chapter ----


@each_chapter
def test_sections(path):
    headings = re.findall(r"^## +(.+?)\s*$", prose(read(path)), re.MULTILINE)
    assert [h for h in headings if h in SECTIONS] == SECTIONS
    titles = re.findall(r"^# +(.+)$", prose(read(path)), re.MULTILINE)
    assert len(titles) == 1


@each_chapter
def test_boxes(path):
    text = prose(read(path))
    assert re.search(r"^:class: .*\btakeaway\b", text, re.MULTILINE), "no takeaway box"
    assert re.search(r"^`{3,}\{prf:(theorem|definition|proposition|lemma)\}", text, re.MULTILINE), "no prf: box"


@each_chapter
def test_every_exercise_has_a_folding_solution(path):
    text = prose(read(path))
    exercises = re.findall(r"^`{3,}\{exercise(?:-start)?\}.*\n(?::.*\n)*?:label: *(\S+)", text, re.MULTILINE)
    opened = re.findall(r"^`{3,}\{exercise(?:-start)?\}", text, re.MULTILINE)
    solutions = re.findall(r"^`{3,}\{solution(?:-start)?\} *(\S+)\n((?::.*\n)*)", text, re.MULTILINE)
    assert len(exercises) == len(opened), "an exercise without a label"
    assert len(exercises) >= 5
    assert [label for label, _ in solutions] == exercises, "each exercise is followed by its solution"
    for label, options in solutions:
        assert re.search(r"^:class: .*\bdropdown\b", options, re.MULTILINE), f"{label} does not fold"
        assert ":label: sol-" in options, f"the solution of {label} has no label"


@each_chapter
def test_no_chapter_defines_a_public_name(path):
    for cell in code_cells(read(path)):
        for node in ast.walk(ast.parse(python(cell))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined = {node.name}
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
                defined = {target.id for target in node.targets if isinstance(target, ast.Name)}
            else:
                continue
            clash = defined & set(public_names())
            assert not clash, f"{path.stem}, cell {cell.execution_count} defines {clash}, as the package does"


@each_chapter
def test_cites_its_sources(path):
    assert re.search(r"\{cite:[tp]s?\}`", prose(read(path)))


@each_chapter
def test_checks_itself(path):
    checks = [cell for cell in code_cells(read(path)) if re.search(r"^\s*assert ", cell.source, re.MULTILINE)]
    assert len(checks) >= 3, "by hand, then the package, then assert: they agree"
