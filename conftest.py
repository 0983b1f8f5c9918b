"""Every test and docstring example runs in float64, on the CPU, without a window."""

import gc
import os
from collections import Counter
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

from tools import executed

# Most programs of the tests run once, and most of the time went into compiling them. XLA reads these flags when it
# starts, and then they go: the chapters, the build and what a test starts compile as they do for a reader.
# `OPTIMISED=1 make test` compiles everything so.
LITTLE = "" if "OPTIMISED" in os.environ else "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
GIVEN = os.environ.get("XLA_FLAGS")
os.environ["XLA_FLAGS"] = f"{GIVEN or ''} {LITTLE}".strip()
jax.config.update("jax_enable_x64", True)
if LITTLE:  # the name of a program in the cache will not hold these flags, so it has a cache of its own
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"] + "/little")
jax.block_until_ready(jax.numpy.zeros(1) + 1)
del os.environ["XLA_FLAGS"]
if GIVEN is not None:
    os.environ["XLA_FLAGS"] = GIVEN
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


def pytest_collection_modifyitems(items):
    """Notebooks first, the long ones before the others: the tests of the pages then find them executed."""
    cells = Counter(item.path for item in items if item.path.suffix == ".ipynb")
    items.sort(key=lambda item: -cells[item.path])


RUN = pytest.StashKey[list]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """After the last cell of a notebook, keep what its cells gave for the build."""
    report = yield
    if item.path.suffix == ".ipynb" and call.when == "call":
        notebook = item.parent
        run = notebook.stash.setdefault(RUN, [executed.place(item.config.rootpath)])
        if report.passed:
            run.append((item.test_outputs, report.duration))
        total = sum(cell.cell_type == "code" for cell in notebook.nb.cells)
        if len(run) == 1 + total and item.cell_num == total - 1:
            outputs, seconds = zip(*run[1:], strict=True)
            language = notebook.kernel.kc.kernel_info(reply=True, timeout=60)["content"]["language_info"]
            executed.keep(run[0], notebook.nb, item.path.stem, outputs, language, sum(seconds))
    return report


# A notebook's cells share a kernel and go in order; the tests of these files share one slow build.
TOGETHER = (".ipynb", "test_browser.py", "test_build.py", "test_packaging.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Spread tests over the workers one by one, in order, but for those that belong together.

    xdist's own `--dist loadgroup` does this by renaming tests, which pytest 9.2 no longer lets it do.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return file if file.endswith(TOGETHER) else nodeid

    config.option.loadscopereorder = False
    return Scheduling(config, log)
