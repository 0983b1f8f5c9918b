"""The laws of the subject, on random instances (hypothesis) and by measured orders."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fisherbook as fb

few = settings(max_examples=12, deadline=None, derandomize=True)
numbers = st.floats(-2.0, 2.0).map(lambda v: round(v, 3))
vectors = st.lists(numbers, min_size=3, max_size=3).map(np.array)

RNG = np.random.default_rng(0)
X = RNG.normal(size=(7, 3))


def softmax(t):
    return dist.Categorical(logits=jnp.append(t, 0.0))


def poisson(t, x):
    return dist.Poisson(jnp.exp(x @ t / 2))


def skew(t):
    """Asymmetric in each parameter, so that the cubic term of KL does not vanish."""
    return dist.Gamma(jnp.exp(t[0]), jnp.exp(t[1] + 0.3 * t[2]))


FISHERS = {
    "softmax": jax.jit(lambda t: fb.score_covariance(softmax, t)),
    "poisson": jax.jit(lambda t: fb.score_covariance(poisson, t, X)),
    "gamma": jax.jit(lambda t: fb.score_covariance(skew, t)),
}


@pytest.mark.parametrize("name", FISHERS)
@few
@given(vectors)
def test_positive_semi_definite_and_symmetric(name, t):
    F = np.asarray(FISHERS[name](t))
    assert np.array_equal(F, F.T)
    assert np.linalg.eigvalsh(F).min() >= -1e-12 * np.trace(F)


A = np.array([[1.0, 0.4, 0.0], [-0.2, 1.5, 0.3], [0.0, 0.1, 0.7]])


def bend(u):
    return jnp.asarray(A) @ u + 0.1 * u**3


bent = jax.jit(lambda u: fb.score_covariance(lambda v: softmax(bend(v)), u))


@few
@given(vectors)
def test_reparametrisation(u):
    J = jax.jacfwd(bend)(u)
    expected = fb.reparametrize(FISHERS["softmax"](bend(u)), J)
    np.testing.assert_allclose(bent(u), expected, atol=1e-12 * np.trace(expected))


pair = jax.jit(lambda t: fb.score_covariance(lambda t: dist.Poisson(jnp.exp(X @ t / 2)).to_event(1), t))


@few
@given(vectors)
def test_information_adds_over_independent_observations(t):
    np.testing.assert_allclose(pair(t), 7 * FISHERS["poisson"](t), rtol=1e-10)


def binned(t, cuts):
    """The counts of gamma outcomes are grouped: a statistic of softmax outcomes merges the classes of each group."""
    p = jax.nn.softmax(jnp.append(t, 0.0))
    return dist.Categorical(probs=jnp.stack([p[:cuts].sum(), p[cuts:].sum()]))


grouped = {cuts: jax.jit(lambda t, cuts=cuts: fb.score_covariance(lambda s: binned(s, cuts), t)) for cuts in (1, 2)}


@few
@given(vectors, st.sampled_from([1, 2]))
def test_never_more_information_in_a_statistic(t, cuts):
    gap = np.asarray(FISHERS["softmax"](t) - grouped[cuts](t))
    assert np.linalg.eigvalsh(gap).min() >= -1e-12


@few
@given(vectors)
def test_marginal_is_at_most_conditional_information(t):
    F = FISHERS["gamma"](t[:3]) + jnp.eye(3)
    gap = fb.conditional_information(F, [0, 1]) - fb.marginal_information(F, [0, 1])
    assert np.linalg.eigvalsh(gap).min() >= -1e-12 * np.trace(F)
    np.testing.assert_allclose(fb.marginal_information(F, [0, 1]), np.linalg.inv(np.linalg.inv(F)[:2, :2]), rtol=1e-8)


CASES = {
    "softmax": (softmax, jnp.array([0.3, -0.4, 0.8]), None),
    "poisson": (poisson, jnp.array([0.3, -0.4, 0.8]), X),
    "gamma": (skew, jnp.array([0.3, -0.4, 0.8]), None),
}


@pytest.mark.parametrize("name", CASES)
def test_kl_is_half_the_quadratic_form_to_third_order(name):
    model, t, x = CASES[name]
    direction = jnp.array([0.6, 0.5, -0.3])
    divergence = jax.jit(lambda h: fb.kl_divergence(model, t, t + h * direction, x))
    quadratic = 0.5 * direction @ fb.kl_curvature(model, t, x) @ direction
    h = np.array([0.08, 0.04, 0.02])
    rest = np.array([abs(float(divergence(step)) - step**2 * float(quadratic)) for step in h])
    order = np.polyfit(np.log(h), np.log(rest), 1)[0]
    assert order >= 2.9


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "definition", [fb.score_covariance, fb.kl_curvature, fb.expected_hessian, fb.hellinger_jacobian]
)
def test_jit_equals_eager_and_vmap_equals_a_loop(name, definition):
    model, t, x = CASES[name]
    law = fb.Exact(outcomes=128) if name == "poisson" else fb.Exact()  # as many rows of J in both
    ts = jnp.stack([t, -t])

    def call(t):
        return definition(model, t, x, law=law)

    loop = np.stack([call(t) for t in ts])
    size = np.abs(loop).max()
    np.testing.assert_allclose(jax.jit(call)(t), loop[0], atol=1e-12 * size)
    np.testing.assert_allclose(jax.vmap(call)(ts), loop, atol=1e-12 * size)


def test_score_and_distances_under_jit_and_vmap():
    y = jnp.arange(7) % 4
    t = jnp.array([0.3, -0.4, 0.8])
    np.testing.assert_allclose(jax.jit(lambda t: fb.score(poisson, t, y, X))(t), fb.score(poisson, t, y, X), rtol=1e-12)
    others = jnp.stack([t + 0.1, t - 0.2])
    for distance in (fb.kl_divergence, fb.hellinger_distance):
        together = jax.vmap(lambda o, d=distance: d(poisson, t, o, X))(others)
        np.testing.assert_allclose(together, [distance(poisson, t, o, X) for o in others], rtol=1e-10)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("jit", [False, True])
def test_the_grid_of_inputs_outputs_types_and_jit(dtype, n, classes, jit):
    """F = mean_n (diag p - p p^T) kron x x^T, every law of the model's own, in float32 and float64."""
    with jax.enable_x64(dtype == jnp.float64):
        x = jnp.asarray(X[:n], dtype)
        W = jnp.asarray(RNG.normal(size=(3, classes)), dtype)

        def model(W, x):
            return dist.Categorical(logits=x @ W)

        p = jax.nn.softmax(x @ W)
        closed = jnp.einsum("ni,nj,nab->iajb", x, x, jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None, :]) / n
        closed = np.asarray(closed).reshape(3 * classes, 3 * classes)
        draws = 4000
        tolerance = {"exact": 1e3 * np.finfo(dtype).eps, "sampled": 8 / np.sqrt(draws)}  # 8 standard errors
        for name, law in {"exact": fb.Exact(), "sampled": fb.MonteCarlo(jax.random.key(1), draws)}.items():
            for definition in (fb.score_covariance, fb.kl_curvature, fb.hellinger_jacobian):

                def call(W, definition=definition, law=law):
                    return definition(model, W, x, law=law)

                F = (jax.jit(call) if jit else call)(W)
                assert F.dtype == dtype
                F = 4 * F.T @ F if definition is fb.hellinger_jacobian else F
                np.testing.assert_allclose(F, closed, atol=tolerance[name] * np.abs(closed).max())
