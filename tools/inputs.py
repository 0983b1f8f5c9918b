"""What a build depends on: the documents of the table of contents, and fingerprints of the inputs."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path

from sphinx_external_toc.parsing import parse_toc_yaml

IGNORED = {"__pycache__", ".ipynb_checkpoints"}


def documents(root: Path) -> list[Path]:
    """The book's pages in reading order, as `_toc.yml` lists them."""
    names = list(dict.fromkeys(_walk(parse_toc_yaml(root / "_toc.yml"))))
    found = [path for name in names if (path := _source(root, name)) is not None]
    missing = [n for n in names if n != "genindex" and _source(root, n) is None]
    if missing:
        raise FileNotFoundError(f"_toc.yml lists pages that do not exist: {', '.join(missing)}")
    return found


def chapters(root: Path) -> list[Path]:
    """The chapters: the notebooks among the pages."""
    return [path for path in documents(root) if path.suffix == ".ipynb"]


def environment_fingerprint(root: Path) -> str:
    """Digest of what every chapter's output depends on besides the chapter itself."""
    return _digest(
        root,
        [*(root / "fisherbook").rglob("*.py"), root / "requirements.txt"],
        salt=sys.version,
    )


def book_fingerprint(root: Path) -> str:
    """Digest of everything the pages depend on."""
    named = ["_config.yml", "_toc.yml", "pyproject.toml", "CHANGELOG.md", "benchmarks/results.json"]
    folders = ["book", "fisherbook", "tools"]
    files = [root / name for name in named] + [root / "genindex.md"]
    files += [path for folder in folders for path in (root / folder).rglob("*")]
    return _digest(root, files, salt=environment_fingerprint(root))


def _walk(site_map) -> Iterable[str]:
    # The table of contents is a tree of documents; depth first is the reading order.
    def visit(name: str) -> Iterable[str]:
        yield name
        if name in site_map:
            for subtree in site_map[name].subtrees:
                for item in subtree.items:
                    if isinstance(item, str):
                        yield from visit(str(item))

    return visit(site_map.root.docname)


def _source(root: Path, name: str) -> Path | None:
    candidates = [root / name, *(root / f"{name}{suffix}" for suffix in (".ipynb", ".md"))]
    return next((path for path in candidates if path.is_file()), None)


def _digest(root: Path, files: Iterable[Path], salt: str) -> str:
    digest = hashlib.sha256(salt.encode())
    for path in sorted(set(files)):
        if path.is_file() and not IGNORED.intersection(path.parts):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()
