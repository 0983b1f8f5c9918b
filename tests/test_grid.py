"""The grid over the five structures, against loops in NumPy over inputs and outcomes.

Structure, law, outputs, inputs, dtype, jit and split in batches make several hundred points, and each compiles its own
programs. So the tests visit a part of them in which every combination of levels of any three factors is met.
"""

from functools import cache, partial
from itertools import combinations, product

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import fisherbook as fb

SIGMA, DAMPING = 0.7, 0.5
KEYS = jax.random.split(jax.random.key(0), 5)
THETA = {"V": jax.random.normal(KEYS[0], (2, 2)), "W": jax.random.normal(KEYS[1], (2, 2)), "b": jnp.array([0.3, -0.4])}
X = jax.random.normal(KEYS[2], (5, 2))
Y = {"one": jnp.array([1, 0, 0, 1, 1]), "many": jax.random.normal(KEYS[3], (5, 2))}
DRAW = KEYS[4]
ONCE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # run once, so compiled fast


def network(t, x):
    return jnp.tanh(x @ t["W"] + t["b"]) @ t["V"]


# the law of y given the outputs f [n, outputs] of the network
OUTPUTS = {
    "one": lambda f: dist.Bernoulli(logits=f[:, 0]),
    "many": lambda f: dist.Normal(f, SIGMA).to_event(1),
}
BUILDS = {
    "dense": fb.dense_fisher,
    "diagonal": fb.diagonal_fisher,
    "kronecker": fb.kronecker_fisher,
    "low rank": fb.low_rank_fisher,  # its default rank is above d
    "implicit": fb.implicit_fisher,
}
FACTORS = {
    "structure": list(BUILDS),
    "law": ["exact", "one draw", "four draws", "data"],
    "outputs": list(OUTPUTS),
    "inputs": [1, 5],
    "dtype": ["float32", "float64"],
    "jit": [False, True],
    "split": [False, True],
}


def possible(point):
    """Products that read batches again and again are refused under jit (tests/test_batches.py)."""
    return not (point["structure"] == "implicit" and point["jit"] and point["split"])


def triples(point):
    return combinations(point.items(), 3)


@cache
def covering():
    """Points that meet every possible triple of levels, chosen greedily: next is what meets most of the missing."""
    points = [dict(zip(FACTORS, levels, strict=True)) for levels in product(*FACTORS.values())]
    points = [point for point in points if possible(point)]
    number = {triple: i for i, triple in enumerate(dict.fromkeys(t for p in points for t in triples(p)))}
    masks = [sum(1 << number[triple] for triple in triples(point)) for point in points]
    missing, chosen = (1 << len(number)) - 1, []
    while missing:
        best = max(range(len(points)), key=lambda i: (masks[i] & missing).bit_count())
        chosen.append(points[best])
        missing &= ~masks[best]
    return chosen


# --- the reference: loops over inputs and outcomes, in float64 ----------------------------------------------------


def output_score(name, f, y):
    """The derivative of log p(y) in the outputs f of the network."""
    return (y - f) / SIGMA**2 if name == "many" else y - 1 / (1 + np.exp(-f))


def exact_scores(name, f):
    """Scores of the outcomes with their probabilities; for normal noise, vectors that have its second moment."""
    if name == "many":
        return [(r / SIGMA, 1.0) for r in np.eye(2)]
    p = 1 / (1 + np.exp(-f[0]))
    return [(output_score(name, f, y), q) for y, q in ((0.0, 1 - p), (1.0, p))]


def outcomes(point, theta, x, y, i):
    """The observation of row i, or its draws: its own key, and a distribution of this row alone."""
    if point["law"] == "data":
        return [y[i]]
    row = model_of(point["outputs"])(theta, x[i : i + 1])
    return row.sample(jax.random.fold_in(DRAW, i), (draws_of(point["law"]),))[:, 0]


def weighted_scores(point, theta, x, y, i, f):
    if point["law"] == "exact":
        return exact_scores(point["outputs"], f)
    given = [np.asarray(one, float) for one in outcomes(point, theta, x, y, i)]
    return [(output_score(point["outputs"], f, one), 1 / len(given)) for one in given]


def reference(point, theta, x, y):
    """The matrix of a structure by its own definition: of the diagonal, the diagonal; of K-FAC, its two factors."""
    V, W, b = (np.asarray(theta[k], float) for k in "VWb")
    F, A, G = 0.0, [0.0, 0.0], [0.0, 0.0]
    for i, row in enumerate(np.asarray(x, float)):
        h = np.tanh(row @ W + b)
        a = [h, np.append(row, 1)]
        A = [sums + np.outer(one, one) / len(x) for sums, one in zip(A, a, strict=True)]
        for r, p in weighted_scores(point, theta, x, y, i, h @ V):
            g = [r, (V @ r) * (1 - h**2)]
            score = np.concatenate([np.outer(a[k], g[k]).ravel() for k in (0, 1)])
            F = F + p * np.outer(score, score) / len(x)
            G = [sums + p * np.outer(one, one) / len(x) for sums, one in zip(G, g, strict=True)]
    if point["structure"] == "kronecker":
        F = jax.scipy.linalg.block_diag(*[np.kron(A[k], G[k]) for k in (0, 1)])
    return np.diag(np.diag(F)) if point["structure"] == "diagonal" else np.asarray(F)


# --- the operators ------------------------------------------------------------------------------------------------


def model_of(name):
    return lambda t, x: OUTPUTS[name](network(t, x))


def draws_of(law):
    return 1 if law == "one draw" else 4


def law_of(point, y):
    if "draw" in point["law"]:
        return fb.MonteCarlo(DRAW, draws_of(point["law"]))
    return fb.Exact() if point["law"] == "exact" else fb.Data(y)


def problem(point):
    width, dtype = {"one": 1, "many": 2}[point["outputs"]], point["dtype"]
    theta = jax.tree.map(lambda a: a.astype(dtype), {**THETA, "V": THETA["V"][:, :width]})
    y = Y[point["outputs"]][: point["inputs"]]
    return theta, X[: point["inputs"]].astype(dtype), y if point["outputs"] == "one" else y.astype(dtype)


def results(point, theta, x, y, v):
    if point["split"] and len(x) > 1:  # batches of unlike length
        inputs, law = fb.Batches([x[:2], x[2:]]), law_of(point, fb.Batches([y[:2], y[2:]]))
    else:
        inputs, law = fb.Batches([x]) if point["split"] else x, law_of(point, y)
    F = BUILDS[point["structure"]](model_of(point["outputs"]), theta, inputs, law=law)
    one = {"solve": F.solve(v, DAMPING)} if point["jit"] else {"trace": F.trace()}  # less to compile than both
    return {"matrix": F.as_matrix(), **one}


def failures(point):
    theta, x, y = problem(point)
    M, eps = reference(point, theta, x, y), float(jnp.finfo(point["dtype"]).eps)
    v = jnp.linspace(-1, 1, len(M)).astype(point["dtype"])
    run = partial(results, point)
    found = (jax.jit(run, compiler_options=ONCE) if point["jit"] else run)(theta, x, y, v)
    solved = np.linalg.solve(M + DAMPING * np.eye(len(M)), np.asarray(v, float))
    size, conjugate = np.abs(M).max(), max(1e-7, 1e3 * eps)  # CG stops at a relative residual of 1e-8, or 10 eps
    expected = {
        "matrix": (M, 100 * eps * size),
        "trace": (np.trace(M), 100 * eps * size),
        "solve": (solved, (conjugate if point["structure"] == "implicit" else 1e3 * eps) * np.abs(solved).max()),
    }
    for name in found:
        value, atol = expected[name]
        error = np.abs(np.asarray(found[name], float) - value).max()
        if found[name].dtype != point["dtype"]:
            yield f"{name} is {found[name].dtype} at {point}"
        if not error <= atol:
            yield f"{name} is off by {error:.1e}, tolerated {atol:.1e}, at {point}"


@pytest.mark.parametrize("structure", FACTORS["structure"])
@pytest.mark.parametrize("law", FACTORS["law"])
def test_structure_under_law(structure, law):
    points = [p for p in covering() if (p["structure"], p["law"]) == (structure, law)]
    assert len(points) >= 2
    wrong = [line for point in points for line in failures(point)]
    assert not wrong, "\n".join(wrong)
