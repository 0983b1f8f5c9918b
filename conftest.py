"""Every test and docstring example runs in float64, on the CPU, without a window."""

import gc
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The kernels of the notebooks inherit the environment, and draw nothing if it names a backend.
os.environ.pop("MPLBACKEND", None)

# What one test has compiled, no other test, worker or kernel of a notebook compiles again. JAX names a program by its
# text, its options and its own version, so nothing stale is found; `make clean` removes it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent / "_build" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import matplotlib
import pytest

jax.config.update("jax_enable_x64", True)
matplotlib.use("agg")

# Linux gives a process 65530 memory maps (vm.max_map_count), and each compiled program holds a few of them; XLA
# crashes in the compiler when there are no more. Many tests compile thousands of programs.
MAPS = Path("/proc/self/maps")
MANY_MAPS = 20_000


@pytest.fixture(autouse=True)
def few_programs():
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        from fisherbook.compilation import SEEN

        SEEN.clear()
        jax.clear_caches()
        gc.collect()


# A notebook's cells share a kernel and go in order; the tests of these files share one slow build.
TOGETHER = (".ipynb", "test_browser.py", "test_build.py", "test_packaging.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Spread tests over the workers one by one, but for those that belong together, which go first.

    xdist's own `--dist loadgroup` does this by renaming tests, which pytest 9.2 no longer lets it do.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return file if file.endswith(TOGETHER) else nodeid

    return Scheduling(config, log)
