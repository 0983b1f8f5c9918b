"""The house: imports go strictly down, each file is one idea."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fisherbook"

# From the ground up. A module may import from the rows above its own, and from no other; the three
# definitions stand in one row, since their agreement is a check only while they share no code.
# A folder is one entry: its files may import one another.
LAYERS = [
    ["distributions", "compilation"],
    ["quadrature"],
    ["model"],
    ["separation", "part", "dependence"],
    ["law"],
    ["outcomes", "batches"],
    ["checks"],
    ["expectation"],
    ["score", "hellinger", "kl"],
    ["bounds"],
    ["families"],
    ["root", "layers"],
    ["operators"],
    ["inference"],
    ["likelihood"],
    ["scoring"],
    ["levenberg_marquardt"],
    ["natural_gradient"],
    ["laplace"],
    ["geometry", "spectrum", "design"],
    ["practice"],
    ["plotting"],
]
LEVEL = {name: level for level, row in enumerate(LAYERS) for name in row}
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = [path for path in FILES if path != PACKAGE / "__init__.py"]


def room(path):
    """The entry of LAYERS a file belongs to: its module, or the folder it stands in."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path):
    """The rooms of the package that a file imports from, whether by relative or by absolute imports."""
    package = ("fisherbook", *path.relative_to(PACKAGE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*above, *filter(None, [node.module])])
            names = [f"{source}.{alias.name}" for alias in node.names] if source == "fisherbook" else [source]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("fisherbook.")}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_go_strictly_down(path):
    own = room(path)
    assert own in LEVEL, f"give {own} its place in LAYERS"
    for other in imports(path) - {own}:
        assert other in LEVEL, f"{path.name} imports fisherbook.{other}, which is no module"
        assert LEVEL[other] < LEVEL[own], f"{own} imports {other}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_imports_plotting(path):
    assert "plotting" not in imports(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_one_idea(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 300
