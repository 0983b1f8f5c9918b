"""One contract for every structure, against dense float64 linear algebra on the score covariance."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import fisherbook as fb
from fisherbook.operators import dense_fisher, diagonal_fisher, implicit_fisher, low_rank_fisher

EXACT = {"dense": dense_fisher, "implicit": implicit_fisher, "low rank": partial(low_rank_fisher, rank=10_000)}
ALL = EXACT | {"diagonal": diagonal_fisher, "rank 3": partial(low_rank_fisher, rank=3)}


def network(theta, x):
    return jnp.tanh(x @ theta["W1"] + theta["b1"]) @ theta["W2"] + theta["b2"]


def weights(key, sizes, dtype=float):
    keys = jax.random.split(key, 2)
    a, b, c = sizes
    return {
        "W1": jax.random.normal(keys[0], (a, b), dtype),
        "W2": jax.random.normal(keys[1], (b, c), dtype),
        "b1": jnp.linspace(-0.5, 0.5, b, dtype=dtype),
        "b2": jnp.zeros(c, dtype),
    }


def inputs(n, d=2, dtype=float):
    return jax.random.normal(jax.random.key(7), (n, d), dtype)


# name: (model, theta, x); regular unless the name says singular
PROBLEMS = {
    "logistic regression": (
        lambda t, x: dist.Bernoulli(logits=x @ t["slope"] + t["constant"]),
        {"constant": 0.3, "slope": jnp.array([1.0, -0.5])},
        inputs(9),
    ),
    "normal, both parameters": (
        lambda t: dist.Normal(t["mean"], jnp.exp(t["log_sd"])),
        {"log_sd": 0.3, "mean": 1.0},
        None,
    ),
    "network, normal": (
        lambda t, x: dist.Normal(network(t, x), 0.7).to_event(1),
        weights(jax.random.key(0), (2, 3, 2)),
        inputs(20),
    ),
    "network, categorical (singular)": (
        lambda t, x: dist.Categorical(logits=network(t, x)),
        weights(jax.random.key(1), (2, 4, 3)),
        inputs(12),
    ),
    "one input (singular)": (
        lambda t, x: dist.Categorical(logits=network(t, x)),
        weights(jax.random.key(2), (2, 4, 3)),
        inputs(1),
    ),
    "by quadrature": (lambda t, x: dist.StudentT(5.0, x @ t, 1.5), jnp.array([0.5, -0.2]), inputs(6)),
}
REGULAR = [name for name in PROBLEMS if "singular" not in name]
KEY = jax.random.key(3)


def laws(model, theta, x):
    draw = fb.MonteCarlo(KEY, 4)
    whole = model(theta) if x is None else model(theta, x)
    y = whole.sample(jax.random.key(4), (5,) if x is None else ())
    return {"exact": fb.Exact(), "one draw": fb.MonteCarlo(KEY, 1), "four draws": draw, "data": fb.Data(y)}


def oracle(model, theta, x, law):
    return np.asarray(fb.score_covariance(model, theta, x, law=law))


@pytest.mark.parametrize("law", ["exact", "one draw", "four draws", "data"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_matrix(name, law):
    model, theta, x = PROBLEMS[name]
    law = laws(model, theta, x)[law]
    F = oracle(model, theta, x, law)
    size = np.abs(F).max()
    for structure, build in EXACT.items():
        found = build(model, theta, x, law=law)
        np.testing.assert_allclose(found.as_matrix(), F, atol=1e-11 * size, err_msg=structure)
        np.testing.assert_allclose(found.diagonal(), np.diag(F), atol=1e-11 * size)
        np.testing.assert_allclose(found.trace(), np.trace(F), rtol=1e-11)
    np.testing.assert_allclose(
        diagonal_fisher(model, theta, x, law=law).as_matrix(), np.diag(np.diag(F)), atol=1e-11 * size
    )
    values = np.linalg.eigvalsh(F)[::-1]
    low = low_rank_fisher(model, theta, x, law=law, rank=2)
    np.testing.assert_allclose(low.eigenvalues(), values[: len(low.values)], atol=1e-7 * size)
    np.testing.assert_allclose(low.trace() + low.discarded, np.trace(F), rtol=1e-10)


@pytest.fixture(scope="module")
def built():
    """Every structure on two problems, with the matrix that it stands for."""
    out = {}
    for name in ("network, normal", "network, categorical (singular)"):
        model, theta, x = PROBLEMS[name]
        for structure, build in ALL.items():
            F = build(model, theta, x)
            out[structure, name] = F, np.asarray(F.as_matrix())
    return out


each = pytest.mark.parametrize("structure", ALL)
both = pytest.mark.parametrize("name", ["network, normal", "network, categorical (singular)"])


@each
@both
@pytest.mark.parametrize("damping", [0.3, "per leaf"])
def test_solve_logdet_and_forms(built, structure, name, damping):
    F, M = built[structure, name]
    theta, d = F.theta, len(M)
    D = damping
    if damping == "per leaf":
        damping = {"W1": 0.1, "W2": 0.5, "b1": 1.0, "b2": 2.0}
        D = np.concatenate([np.full(np.size(theta[k]), damping[k]) for k in theta])
    total = M + D * np.eye(d)
    V = np.asarray(jax.random.normal(jax.random.key(5), (d, 2)))
    np.testing.assert_allclose(F @ V, M @ V, atol=1e-10)
    np.testing.assert_allclose(F.solve(V, damping), np.linalg.solve(total, V), rtol=1e-6, atol=1e-7)  # CG: rtol 1e-8
    np.testing.assert_allclose(F.solve(V[:, 0], damping), np.linalg.solve(total, V[:, 0]), rtol=1e-6, atol=1e-7)
    tree = F.solve(theta, damping)
    assert jax.tree.structure(tree) == jax.tree.structure(theta)
    flat = jax.flatten_util.ravel_pytree
    np.testing.assert_allclose(flat(tree)[0], np.linalg.solve(total, flat(theta)[0]), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(F.logdet(damping), np.linalg.slogdet(total)[1], rtol=1e-9)


@each
@both
def test_draws_have_the_inverse_as_covariance(built, structure, name):
    F, M = built[structure, name]
    draws = np.asarray(F.sample(jax.random.key(6), (20_000,), damping=0.5))
    assert draws.shape == (20_000, len(M))
    covariance = np.linalg.inv(M + 0.5 * np.eye(len(M)))
    scale = np.sqrt(np.diag(covariance))
    error = (draws.T @ draws / len(draws) - covariance) / np.outer(scale, scale)
    assert np.abs(error).max() < 5.5 * np.sqrt(2 / len(draws))


@each
def test_arithmetic(built, structure):
    F, M = built[structure, "network, normal"]
    np.testing.assert_allclose((2.5 * F).as_matrix(), 2.5 * M, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose((F * 2.0).diagonal(), 2 * np.diag(M), rtol=1e-9, atol=1e-12)
    v = np.ones(len(M))
    expected = np.linalg.solve(2.5 * M + 0.1 * np.eye(len(M)), v)
    np.testing.assert_allclose((2.5 * F).solve(v, 0.1), expected, rtol=1e-5)
    other, N = built["dense", "network, normal"]
    total = F + other
    np.testing.assert_allclose(total.as_matrix(), M + N, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(total.solve(v, 0.1), np.linalg.solve(M + N + 0.1 * np.eye(len(M)), v), rtol=1e-6)
    np.testing.assert_allclose((F + F).diagonal(), 2 * np.diag(M), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(total.logdet(0.2), np.linalg.slogdet(M + N + 0.2 * np.eye(len(M)))[1], rtol=1e-9)


@each
def test_display_and_lineax(built, structure):
    F, M = built[structure, "network, categorical (singular)"]
    html = F._repr_html_()
    assert f"{len(M)} x {len(M)}" in html
    assert "Exact" in html
    assert "trace" in html
    np.testing.assert_allclose(F.as_lineax().mv(jnp.ones(len(M))), M @ np.ones(len(M)), atol=1e-10)
    assert F.shape == (len(M), len(M))


@each
@both
def test_works_under_jit(built, structure, name):
    model, theta, x = PROBLEMS[name]
    _, M = built[structure, name]

    @jax.jit
    def step(theta, x, v):
        F = ALL[structure](model, theta, x)
        return F @ v, F.solve(v, 0.2), F.trace()

    v = jnp.linspace(-1.0, 1.0, len(M))
    product, solved, trace = step(theta, x, v)
    np.testing.assert_allclose(product, M @ v, atol=1e-9)
    np.testing.assert_allclose(solved, np.linalg.solve(M + 0.2 * np.eye(len(M)), v), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(trace, np.trace(M), rtol=1e-9)


@each
def test_singular_and_undamped_raises(built, structure):
    F, M = built[structure, "network, categorical (singular)"]
    if structure == "diagonal":  # a diagonal of positive entries is regular
        np.testing.assert_allclose(F.solve(np.ones(len(M))), 1 / np.diag(M))
        return
    for call in (lambda: F.solve(np.ones(len(M))), lambda: F.logdet(), lambda: F.sample(KEY)):
        with pytest.raises(ValueError, match="singular"):
            call()


@each
def test_bad_arguments(built, structure):
    F, M = built[structure, "network, normal"]
    with pytest.raises(ValueError, match=f"an array \\[{len(M)}\\]"):
        F @ np.ones(3)
    with pytest.raises(ValueError, match="damping must be finite and not negative"):
        F.solve(np.ones(len(M)), -1.0)
    with pytest.raises(ValueError, match="one number per leaf"):
        F.solve(np.ones(len(M)), {"W1": 1.0})
    with pytest.raises(ValueError, match="positive number"):
        -1.0 * F
