"""The book's Sphinx extension: the public address, and the generated parts of the front matter.

The address stands in `[project.urls]` of pyproject.toml and nowhere else. What a chapter promises and
which functions it derives stand in `book/chapters.yml`, from which the first page's list and the links
of the API reference are made.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import json
import platform
import re
import tomllib
import typing
from pathlib import Path
from typing import Any

import nbformat
import yaml
from jupyter_cache import get_cache
from sphinx.application import Sphinx
from sphinx.config import Config

from tools import benchmark_tables
from tools.inputs import documents

ROOT = Path(__file__).parents[1]
MENDINGS = [
    (re.compile(r' id="(proof|exercise|solution)-content"'), ""),
    (
        re.compile(r'<div class="proof admonition" id="proof">\s*<p>(Proof\.?)'),
        r'<div class="proof-text"><p><em>\1</em>',
    ),
    (re.compile(r'<div role="list" class="citation-list">'), '<div class="citation-list">'),
    (re.compile(r' role="doc-biblioentry"'), ""),
]
FORMULA = re.compile(r'[(\[“]?<span class="math notranslate nohighlight">[^<]*</span>[.,;:!?)\]”’]*')
RETURNED = ("fisherbook.operators.", "fisherbook.scoring")  # modules whose classes the API reference shows


def address(root: Path = ROOT) -> dict[str, str]:
    """`site` and `repository`, without a closing slash."""
    urls = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    return {"site": urls["Homepage"].rstrip("/"), "repository": urls["Repository"].rstrip("/")}


def chapter_table(root: Path = ROOT) -> dict[str, dict[str, Any]]:
    """Chapter name to its `promise` (one line) and what it `derives` (public names)."""
    return yaml.safe_load((root / "book" / "chapters.yml").read_text(encoding="utf-8"))


def derived_in(root: Path = ROOT) -> dict[str, str]:
    """Public name to the chapter that derives it."""
    return {name: chapter for chapter, row in chapter_table(root).items() for name in row["derives"]}


def public_names() -> list[str]:
    """What `import fisherbook` gives, modules left out."""
    package = importlib.import_module("fisherbook")
    names = [name for name in vars(package) if not name.startswith("_")]
    return [name for name in names if not inspect.ismodule(getattr(package, name))]


def set_address(app: Sphinx, config: Config) -> None:
    urls = address()
    config.html_baseurl = config.ogp_site_url = urls["site"] + "/"
    # Not `update`: the theme keeps a reference to the dictionary it was given.
    config.html_theme_options["repository_url"] = urls["repository"]


def fill_page(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the generated lists where a page asks for them by an HTML comment."""
    generators = {
        "<!-- chapters -->": chapter_list,
        "<!-- api -->": api_reference,
        "<!-- executions -->": execution_table,
        "<!-- versions -->": version_table,
    }
    for mark, generate in generators.items():
        if mark in source[0]:
            text = generate(app)
            if app.env.doc2path(docname).endswith(".ipynb"):  # the text stands in a JSON string
                text = json.dumps(text)[1:-1]
            source[0] = source[0].replace(mark, text)
    source[0] = benchmark_tables.fill(source[0], ROOT)


def chapter_list(app: Sphinx) -> str:
    lines = []
    for name, row in chapter_table().items():
        if f"book/{name}" in app.env.found_docs:
            lines.append(f"{{doc}}`/book/{name}`\n: {row['promise']}\n")
    return "\n".join(lines)


def api_reference(app: Sphinx) -> str:
    """One section per module of the package, with every public name it defines; the figures' module last."""
    package = importlib.import_module("fisherbook")
    modules: dict[str, list[str]] = {}
    for name in public_names():
        modules.setdefault(getattr(package, name).__module__, []).append(f"fisherbook.{name}")
    modules["fisherbook.plotting"] = _functions("fisherbook.plotting")
    sections = [_module_section(module, names) for module, names in modules.items()]
    returned = _entries([f"{cls.__module__}.{cls.__qualname__}" for cls in returned_classes()])
    return "\n\n".join([*sections, "\n".join(["## What these return", "", "```{eval-rst}", *returned, "```"])])


def returned_classes() -> list[type]:
    """Classes of operators and fits that public functions return, and what they inherit from."""
    package = importlib.import_module("fisherbook")
    found: dict[type, None] = {}
    for function in filter(inspect.isfunction, (getattr(package, name) for name in public_names())):
        for cls in _classes(inspect.signature(function, eval_str=True).return_annotation):
            ours = [base for base in reversed(cls.__mro__) if base.__module__.startswith(RETURNED)]
            found |= dict.fromkeys(base for base in ours if not hasattr(package, base.__name__))
    return list(found)


def _classes(annotation: Any) -> list[type]:
    if inspect.isclass(annotation):
        return [annotation]
    return [cls for part in typing.get_args(annotation) for cls in _classes(part)]


def _functions(module: str) -> list[str]:
    defined = vars(importlib.import_module(module)).values()
    functions = [value for value in defined if inspect.isfunction(value) and value.__module__ == module]
    return [f"{module}.{value.__name__}" for value in functions if not value.__name__.startswith("_")]


def _module_section(module: str, names: list[str]) -> str:
    summary = (inspect.getdoc(importlib.import_module(module)) or "").split("\n\n")[0]
    return "\n".join(
        [f"## {module.removeprefix('fisherbook.')}", "", "```{eval-rst}", summary, "", *_entries(names), "```"]
    )


def _entries(names: list[str]) -> list[str]:
    lines = []
    for name in names:
        parent, _, last = name.rpartition(".")
        is_class = inspect.isclass(getattr(importlib.import_module(parent), last))
        lines += [f".. autoclass:: {name}", "   :members:", ""] if is_class else [f".. autofunction:: {name}", ""]
    return lines


def execution_table(app: Sphinx) -> str:
    """Page, code cells and seconds of the execution that these pages show."""
    cache = get_cache(app.config.nb_execution_cache_path or Path(app.outdir).parent / ".jupyter_cache")
    rows = ["| page | cells | seconds |", "| --- | ---: | ---: |"]
    for path in documents(Path(app.srcdir)):
        if path.suffix == ".ipynb":
            notebook = nbformat.read(path, as_version=4)
            cells = sum(cell.cell_type == "code" for cell in notebook.cells)
            seconds = cache.match_cache_notebook(notebook).data["execution_seconds"]
            rows.append(f"| {{doc}}`/book/{path.stem}` | {cells} | {seconds:.1f} |")
    return "\n".join(rows)


def version_table(app: Sphinx) -> str:
    names = ["fisherbook", "jax", "jaxlib", "numpy", "numpyro", "equinox"]
    names += ["matplotlib", "scipy", "scikit-learn", "statsmodels"]
    rows = ["| | version |", "| --- | --- |", f"| Python | {platform.python_version()} |"]
    rows += [f"| {name} | {importlib.metadata.version(name)} |" for name in names]
    return "\n".join(rows)


def link_chapter(app: Sphinx, kind: str, name: str, value: object, options: Any, lines: list[str]) -> None:
    """Close a docstring with a link to the chapter that derives its subject."""
    chapter = derived_in().get(name.removeprefix("fisherbook."))
    if chapter is not None and f"book/{chapter}" in app.env.found_docs:
        lines += ["", f"Chapter: :doc:`/book/{chapter}`.", ""]


def mend_html(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Mend what the extensions write: ids that stand several times on a page, and roles that ARIA forbids."""
    if "body" in context:
        for wrong, right in MENDINGS:
            context["body"] = wrong.sub(right, context["body"])
        # a browser would break a line between a formula and the comma behind it
        context["body"] = FORMULA.sub(r'<span class="glued">\g<0></span>', context["body"])
    if page.startswith("_modules/fisherbook/"):
        module = page.removeprefix("_modules/").replace("/", ".")
        context["body"] = mend_backlinks(context["body"], module, set(app.env.domaindata["py"]["objects"]))


def mend_backlinks(body: str, module: str, documented: set[str]) -> str:
    """The links from source code to the reference: viewcode takes one prefix for all names of a module."""

    def mended(link: re.Match[str]) -> str:
        full = f"{module}.{link['name']}"
        return f'#{full}"' if f"fisherbook.{link['name']}" not in documented and full in documented else link[0]

    return re.sub(r'#fisherbook\.(?P<name>[\w.]+)"', mended, body)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", set_address, priority=1)
    app.connect("source-read", fill_page, priority=1)
    app.connect("autodoc-process-docstring", link_chapter)
    app.connect("html-page-context", mend_html)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
