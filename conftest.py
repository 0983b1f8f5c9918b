"""Every test and docstring example runs in float64, on the CPU, without a window."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The kernels of the notebooks inherit the environment, and draw nothing if it names a backend.
os.environ.pop("MPLBACKEND", None)

import jax
import matplotlib
import pytest

jax.config.update("jax_enable_x64", True)
matplotlib.use("agg")


def pytest_collection_modifyitems(items):
    """With `--dist loadgroup`: a notebook's cells run in one kernel, in order, so on one worker."""
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
