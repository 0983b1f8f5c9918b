"""The benchmarks: their reference answers, the stopwatch, and the tables of the book's page."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import fisherbook as fb
from tools import benchmark_tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results.json"


@pytest.fixture(scope="module")
def work():
    spec = importlib.util.spec_from_file_location("work", ROOT / "benchmarks" / "peers" / "work.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["work"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def small(work):
    rng = np.random.default_rng(0)
    return work.Network(work.weights((5, 4, 3, 2)), rng.normal(size=(6, 5)), rng.integers(0, 2, 6))


def model(theta, x):
    for W, b in zip(theta[:-2:2], theta[1:-2:2], strict=True):
        x = jnp.tanh(x @ W + b)
    return dist.Categorical(logits=x @ theta[-2] + theta[-1])


def test_reference_answers_are_those_of_rows(work, small):
    """Backpropagation in NumPy against the score covariance, which knows of no layers."""
    theta = [jnp.asarray(w, float) for w in small.weights]
    F = np.asarray(fb.score_covariance(model, theta, small.x))
    v = work.direction(small)
    np.testing.assert_allclose(work.exact_matrix(small), F, atol=1e-14)
    np.testing.assert_allclose(work.exact_product(small, v), F @ work.flat(v), atol=1e-13)
    np.testing.assert_allclose(work.exact_diagonal(small), np.diag(F), atol=1e-14)
    expected = np.linalg.matrix_power(F / 10, work.LOOP) @ work.flat(v)
    np.testing.assert_allclose(work.exact_loop(small), expected, rtol=1e-9)
    loss = -model(theta, small.x).log_prob(small.y).mean()
    np.testing.assert_allclose(work.exact_loss(small), [loss], rtol=1e-12)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_stopwatch_sees_memory_and_errors(work):
    held = lambda: np.ones(40 * 2**17)  # 40 MB
    found = work.measure(work.Entry(held, lambda out: out[:2] * 1.01), np.ones(2))
    assert 39 < work.peak_of(held) < 50
    assert 35 < found["first_memory"] < 150
    np.testing.assert_allclose(found["error"], 0.01, rtol=1e-6)
    assert 0 < found["seconds"] < 10


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_what_is_compared_is_timed_in_turns(work, monkeypatch):
    monkeypatch.setattr(work, "PAUSE", 0.0)
    order = []
    call, beside = (lambda: order.append("call")), (lambda: order.append("beside"))
    found = work.measure(work.Entry(call, lambda out: out, beside), np.zeros(0))
    turns = order[order.index("beside") + 1 :]  # the first of them is not timed
    assert found["beside"] > 0
    assert turns.count("call") >= work.REPEATS[0]
    assert "call call" not in " ".join(turns)


def test_race_stops_at_the_goal(work):
    found = work.run(work.Race(lambda: iter([1.0, 0.5, 0.009, 0.001])), np.ones(1))
    assert found["steps"] == 2
    assert work.run(work.Race(lambda: iter([1.0, np.nan])), np.ones(1))["steps"] is None


def test_of_several_processes_the_middle_one(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import compare

    columns = zip((1.2, 1.0, 1.1), (1.0, 3.0, 2.0), (30.0, 10.0, 20.0), (50.0, 70.0, 60.0), strict=True)
    rows = [dict(seconds=r * b, beside=b, memory=m, first_memory=f) for r, b, m, f in columns]
    left = iter(rows)
    monkeypatch.setattr(compare, "one", lambda *_: next(left))
    found = compare.repeated("python", "file", "task", "name", Path("answer"))
    assert found == dict(seconds=2.2, beside=2.0, memory=20.0, first_memory=60.0, processes=3)
    monkeypatch.setattr(compare, "one", lambda *_: {"failed": "out of memory"})
    assert compare.repeated("python", "file", "task", "name", Path("answer")) == {"failed": "out of memory"}


def test_memory_that_could_not_be_measured(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import compare

    monkeypatch.setattr(compare, "LIMIT", 0.01)
    asked = (sys.executable, "ours.py", "inputs", "dense_fisher, 1000000")
    assert compare.memory(*asked) == {"memory": None}
    assert "no memory of dense_fisher, 1000000: not within 0.01 s" in capsys.readouterr().out
    done = subprocess.CompletedProcess([], 0, b'loaded\n{"memory": 7.0}\n')
    monkeypatch.setattr(compare, "run", lambda *_, **__: done)
    assert compare.memory(*asked) == {"memory": 7.0}
    row = dict(name="dense_fisher, 1000", seconds=2.0, memory=None)
    text = benchmark_tables.table("inputs", {"tasks": {"inputs": {"rows": [row]}}})
    assert "| dense_fisher | 2 | not measured |" in text


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_memory_of_slow_calls_is_that_of_one(work, monkeypatch):
    calls = []
    work.peak_of(lambda: calls.append(1))
    assert len(calls) == 3
    monkeypatch.setattr(work, "PATIENCE", 0.0)
    work.peak_of(lambda: calls.append(1))
    assert len(calls) == 3 + 2


def test_every_task_was_measured(work):
    tasks = json.loads(RESULTS.read_text())["tasks"]
    assert set(tasks) == set(work.TASKS)
    assert benchmark_tables.LOOP == work.LOOP
    for name, task in tasks.items():
        assert any(row["name"].startswith(("fisherbook", "dense_fisher")) for row in task["rows"]), name
        for row in task["rows"]:  # an answer that is wrong is no comparison
            assert "failed" in row or row["error"] is None or row["error"] < 1e-4, (name, row["name"])


def test_tables_sort_by_time_and_keep_what_failed():
    memory = dict(memory=10.0, first_memory=90.0)
    row = lambda name, seconds: dict(name=name, seconds=seconds, first=1.0, error=1e-7, beside=0.5, **memory)
    rows = [row("slow", 2.0), row("fisherbook", 1.0) | {"processes": 3}, {"name": "large", "failed": "out of memory"}]
    task = {"date": "2026-01-01", "machine": "a machine", "rows": rows}
    text = benchmark_tables.table("product", {"tasks": {"product": task}, "versions": {}})
    grid, below = text.split("\n\n")
    assert [line.split("|")[1].strip() for line in grid.splitlines()[2:]] == ["**fisherbook**", "slow", "large"]
    assert below == "Of up to 3 processes for each row, the middle one."
    assert "| **fisherbook** | 1 | 2 | 10 | 0 | 90 | 1e-07 |" in text
    assert "out of memory" in text


def test_the_page_says_which_machine_made_which_table():
    task = lambda machine: {"date": "2026-01-01", "machine": machine, "rows": []}
    same = {"tasks": {"product": task("a machine"), "laplace_full": task("a machine")}}
    assert benchmark_tables.table("machine", same).endswith("a machine, on 2026-01-01.")
    text = benchmark_tables.table("machine", {"tasks": same["tasks"] | {"trace": task("another")}})
    assert text.splitlines()[2:] == [
        "| a machine | 2026-01-01 | product, laplace full |",
        "| another | 2026-01-01 | trace |",
    ]


def test_a_table_that_is_not_there():
    with pytest.raises(KeyError, match="nothing"):
        benchmark_tables.table("nothing", {"tasks": {}, "versions": {}})
