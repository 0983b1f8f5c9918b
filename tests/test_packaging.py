"""What `pip install` gives: the package, and nothing of the book."""

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def sources():
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / "fisherbook").rglob("*.py")}


def test_wheel_holds_the_package_only(archives):
    names = {name for name in zipfile.ZipFile(archives[0]).namelist() if ".dist-info/" not in name}
    assert names == sources() | {"fisherbook/py.typed"}


def test_sdist_holds_the_package_only(archives):
    with tarfile.open(archives[1]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    extra = {"README.md", "LICENSE", "pyproject.toml", "PKG-INFO", ".gitignore"}
    assert sources() | {"fisherbook/py.typed"} <= names
    assert names - sources() - {"fisherbook/py.typed"} <= extra


def test_needs_nothing_of_the_book(archives):
    with zipfile.ZipFile(archives[0]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith("METADATA"))
        metadata = email.message_from_bytes(wheel.read(name))
    needs = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    expected = {"jax", "numpy", "numpyro", "equinox", "lineax", "matfree", "optax", "scipy", "tqdm"}
    assert {re.match(r"[\w-]+", need).group() for need in needs} == expected
    assert metadata["Requires-Python"] == ">=3.11"
