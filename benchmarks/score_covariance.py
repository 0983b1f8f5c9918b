"""Speed and memory of `score_covariance` on a logistic regression, beside the raw product, in one run.

    python benchmarks/score_covariance.py

The raw product is NumPy's `(w[:, None] * X).T @ X`, what one would write by hand, with w = p (1 - p) given.
Times are medians of seven, the calls taking turns, so that a busy machine slows all. Memory is the largest
resident size during the call beyond that before it. Import time is the median of five fresh interpreters.
"""

import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import fisherbook as fb

COLUMNS = 50


def model(theta, x):
    return dist.Bernoulli(logits=x @ theta)


def resident() -> float:
    """Resident size in MB, from the kernel."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def extra_memory(call: Callable[[], object]) -> float:
    """Largest resident size while `call` runs, beyond that before, in MB."""
    before, largest, done = resident(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not done.is_set():
            largest = max(largest, resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    jax.block_until_ready(call())
    done.set()
    watcher.join()
    return largest - before


def medians(calls: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Median seconds of each call, the calls taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def import_seconds(statement: str) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    rng = np.random.default_rng(0)
    theta = jnp.asarray(rng.normal(size=COLUMNS) / 7)
    fb.score_covariance(model, theta, rng.normal(size=(1000, COLUMNS)))  # JAX starts its threads and compilers
    print(
        "| inputs | product, s | score_covariance, s | ratio | ratio under jit | memory beyond the data, MB | error |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for n in (10**4, 10**5, 10**6):
        X = rng.normal(size=(n, COLUMNS))
        p = 1 / (1 + np.exp(-X @ np.asarray(theta)))
        w = p * (1 - p)
        memory = extra_memory(lambda X=X: fb.score_covariance(model, theta, X))
        on_device = jnp.asarray(X)
        compiled = jax.jit(lambda t, x: fb.score_covariance(model, t, x))
        F = compiled(theta, on_device)
        product = (w[:, None] * X).T @ X / n
        error = np.abs(F - product).max() / np.abs(product).max()
        t = medians(
            {
                "product": lambda w=w, X=X: (w[:, None] * X).T @ X,
                "call": lambda X=X: fb.score_covariance(model, theta, X),
                "jit": lambda x=on_device, f=compiled: f(theta, x),
            }
        )
        ratios = f"{t['call'] / t['product']:.2f} | {t['jit'] / t['product']:.2f}"
        print(f"| {n:,} | {t['product']:.4f} | {t['call']:.4f} | {ratios} | {memory:.0f} | {error:.0e} |", flush=True)
    base = import_seconds("import jax, numpyro")
    ours = import_seconds("import jax, numpyro, fisherbook")
    print(f"\nImporting fisherbook adds {ours - base:.2f} s to importing JAX and numpyro ({base:.2f} s).")


if __name__ == "__main__":
    main()
