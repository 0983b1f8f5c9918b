"""Time the operators of two networks beside the raw product and beside gradients of the same loss, in one run.

Usage: python benchmarks/operators.py
"""

import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from sklearn.datasets import load_digits

import fisherbook as fb
from fisherbook.root import dense_rows, make_root

REPEATS = 9


def median_time(function, *args):
    """Median seconds of a call, the first one left out."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def compile_time(function, *args):
    start = time.perf_counter()
    function.lower(*args).compile()
    return time.perf_counter() - start


def network(sizes, key):
    """A model of tanh layers with classes for outputs, and its weights in float32."""
    keys, last = jax.random.split(key, len(sizes)), len(sizes) - 2
    layers = list(enumerate(itertools.pairwise(sizes)))
    theta = {f"W{i}": jax.random.normal(keys[i], (a, b), jnp.float32) / a**0.5 for i, (a, b) in layers}
    theta |= {f"b{i}": jnp.zeros(b, jnp.float32) for i, (_, b) in layers}

    def model(theta, x):
        for i, _ in layers:
            z = x @ theta[f"W{i}"] + theta[f"b{i}"]
            x = z if i == last else jnp.tanh(z)
        return dist.Categorical(logits=x)

    return model, theta


def measured(work, function, args, beside, base, error=None, calls=1):
    compiled = compile_time(function, *args)  # before the first call
    return work, median_time(function, *args) / calls, beside, base, compiled, error


def report(rows):
    print("| work | s | beside | ratio | compile, s | error |\n| --- | --- | --- | --- | --- | --- |")
    for work, seconds, beside, base, compiled, error in rows:
        wrong = "" if error is None else f"{error:.0e}"
        print(f"| {work} | {seconds:.4f} | {beside} | {seconds / base:.2f} | {compiled:.1f} | {wrong} |", flush=True)


def dense():
    """The matrix of the digits network, against R^T R in NumPy; the error is relative to float64."""
    x = jnp.asarray(load_digits().data / 16, jnp.float32)
    model, theta = network((64, 32, 10), jax.random.key(0))
    d = 2410
    R = np.asarray(jax.jit(dense_rows)(make_root(model, theta, x))).reshape(-1, d)
    exact = R.astype(float).T @ R.astype(float)
    F = jax.jit(lambda t, x: fb.dense_fisher(model, t, x).as_matrix())
    error = np.abs(np.asarray(F(theta, x)) - exact).max() / np.abs(exact).max()
    raw = median_time(lambda: R.T @ R)
    jax.clear_caches()
    return measured("matrix, 64-32-10, 1797 inputs", F, (theta, x), "R^T R in NumPy", raw, error)


def large(n):
    model, theta = network((784, 512, 256, 10), jax.random.key(1))
    x, y = jax.random.normal(jax.random.key(2), (n, 784), jnp.float32), jnp.arange(n) % 10
    gradient = jax.jit(jax.grad(lambda t, x: -model(t, x).log_prob(y).mean()))
    return model, theta, x, median_time(gradient, theta, x)


def products(n=4096, steps=20):
    """What a network of half a million weights costs, in gradients of its loss."""
    model, theta, x, base = large(n)
    single = jax.jit(lambda t, x, v: fb.implicit_fisher(model, t, x) @ v)
    where = f"784-512-256-10, {n} inputs"
    yield measured(f"one product, {where}", single, (theta, x, theta), "a gradient", base)

    def loop(theta, x, v):
        F = fb.implicit_fisher(model, theta, x)
        return jax.lax.fori_loop(0, steps, lambda _, v: jax.tree.map(lambda a: a / 10, F @ v), v)

    name = f"a product in a loop of {steps}"
    yield measured(name, jax.jit(loop), (theta, x, theta), "a gradient", base, calls=steps)
    diagonal = jax.jit(lambda t, x: fb.diagonal_fisher(model, t, x).diagonal())
    yield measured("diagonal, ten classes", diagonal, (theta, x), "a gradient", base)
    solve = jax.jit(lambda t, x, v: fb.kronecker_fisher(model, t, x).solve(v, 0.1))
    yield measured("K-FAC and its step", solve, (theta, x, theta), "a gradient", base)


def trace(n=512):
    model, theta, x, base = large(n)
    exact = jax.jit(lambda t, x: fb.implicit_fisher(model, t, x).trace())
    return measured(f"trace, {n} inputs", exact, (theta, x), "a gradient", base)


if __name__ == "__main__":
    report([dense(), *products(), trace()])
