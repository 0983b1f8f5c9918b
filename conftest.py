"""Every test and docstring example runs in float64, on the CPU, without a window."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The kernels of the notebooks inherit the environment, and draw nothing if it names a backend.
os.environ.pop("MPLBACKEND", None)

import jax
import matplotlib

jax.config.update("jax_enable_x64", True)
matplotlib.use("agg")
