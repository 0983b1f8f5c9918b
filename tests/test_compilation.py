"""A program is compiled once; a model that has changed is another program."""

import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import fisherbook as fb
from fisherbook.compilation import SEEN, compile_once
from fisherbook.model import require_all

WIDTH = 1.0


def model(t):
    return dist.Normal(t, WIDTH)


def test_a_changed_global_is_seen(monkeypatch):
    first = fb.score_covariance(model, 0.0).item()
    monkeypatch.setattr(f"{__name__}.WIDTH", 2.0)
    np.testing.assert_allclose([first, fb.score_covariance(model, 0.0).item()], [1.0, 0.25], rtol=1e-9)


def test_constants_closed_over_are_part_of_the_program():
    for size in (3, 3000):  # a large constant may be passed apart from the program
        for c in (jnp.arange(size) * 1.0, np.arange(size) * 2.0):
            assert compile_once(lambda v, c=c: jnp.sum(v * c), 1.0)(1.0) == jnp.sum(c)
    for seed in (0, 1):
        law = fb.MonteCarlo(jax.random.key(seed), 50)
        y = dist.Poisson(3.0).sample(jax.random.key(seed), (50,))
        F = fb.score_covariance(lambda t: dist.Poisson(t), 3.0, law=law)
        np.testing.assert_allclose(F, np.mean((np.asarray(y) / 3 - 1) ** 2), rtol=1e-12)


def test_a_model_made_anew_is_not_compiled_anew():
    fb.kl_curvature(lambda t: dist.Gumbel(t, 3.0), 0.5)
    before = len(SEEN)
    F = fb.kl_curvature(lambda t: dist.Gumbel(t, 3.0), 0.7)
    assert len(SEEN) == before
    np.testing.assert_allclose(F, 1 / 9, rtol=1e-9)


@pytest.mark.parametrize("curvature", [fb.dense_fisher, fb.diagonal_fisher, fb.kronecker_fisher])
@pytest.mark.parametrize("method", ["linear_samples", "samples", "probit"])
def test_predictions_under_another_prior_compile_nothing(curvature, method):
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(20, 3))), jnp.asarray(rng.integers(0, 3, 20))
    theta = {"W": jnp.asarray(rng.normal(size=(3, 4))), "V": jnp.asarray(rng.normal(size=(4, 3)))}
    network = lambda t, x: dist.Categorical(logits=jnp.tanh(x @ t["W"]) @ t["V"])
    with warnings.catch_warnings(action="ignore"):  # not at a mode, which is nothing to this
        posterior = fb.laplace(network, theta, y, x, curvature=curvature)

    def predict(prior):
        law = posterior.with_prior(prior).predictive(x, method=method, key=jax.random.key(0), draws=5)
        return np.asarray(law.probs)

    compiled = []
    note = lambda event, *_, **more: compiled.append(more) if event.endswith("backend_compile_duration") else None
    first = predict(1.0)
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        second = predict(2.0)
        assert not compiled
        jax.jit(lambda v: v + 0.123)(1.0)
        assert compiled  # it would have been seen
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert np.abs(first - second).max() > 1e-4


def test_programs_that_call_back_are_not_shared():
    seen = []
    for name in "ab":
        run = compile_once(lambda v, name=name: jax.debug.callback(lambda _: seen.append(name), v), 1.0)
        run(1.0)
        jax.effects_barrier()
    assert seen == ["a", "b"]


@pytest.mark.parametrize("transform", [jax.vmap, jax.jit, lambda f: lambda v: jnp.stack([jax.grad(f)(u) for u in v])])
def test_values_of_an_outer_transformation_may_be_closed_over(transform):
    """A traced second parameter, a traced part of the model, a traced input: theta itself is a plain number."""
    v = jnp.array([1.0, 2.0])
    if transform is jax.jit:
        v = v[0]
    np.testing.assert_allclose(
        transform(lambda u: fb.kl_divergence(lambda t: dist.Normal(t, 1.0), 0.0, u))(v),
        v if transform not in (jax.vmap, jax.jit) else v**2 / 2,
        rtol=1e-8,
    )
    if transform in (jax.vmap, jax.jit):
        F = transform(lambda u: fb.score_covariance(lambda t: dist.Normal(t, u), 0.0))(v)
        np.testing.assert_allclose(F.ravel(), 1 / v.ravel() ** 2, rtol=1e-8)
        s = transform(lambda u: fb.score(lambda t: dist.Normal(t, u), 0.0, jnp.ones(1)))(v)
        np.testing.assert_allclose(s.ravel(), 1 / v.ravel() ** 2, rtol=1e-12)


def test_trees_of_other_shape_are_other_programs():
    assert compile_once(lambda a: {"x": a}, 1.0)(1.0) == {"x": 1.0}
    assert compile_once(lambda a: {"y": a}, 1.0)(1.0) == {"y": 1.0}


def test_programs_that_use_different_arguments_are_not_shared():
    """JAX drops unused arguments, so the texts of these pairs would agree."""
    assert compile_once(lambda a, b: 2 * a, 1.0, 10.0)(1.0, 10.0) == 2
    assert compile_once(lambda a, b: 2 * b, 1.0, 10.0)(1.0, 10.0) == 20
    x = {"low": jnp.ones(3), "high": 2 * jnp.ones(3)}
    for column, expected in (("low", 1.0), ("high", 4.0)):
        F = fb.score_covariance(lambda t, x, c=column: dist.Normal(t * x[c], 1.0), 0.0, x)
        np.testing.assert_allclose(F, [[expected]])


def test_constants_inside_a_program():
    """XLA's garbage for a sum subtracted from a product with a constant (`hide_constants`) does not reach us.

    In a process of its own, where XLA optimises as it does for users; in the others it does not (see conftest.py).
    """
    call = "import test_compilation; test_compilation.constants_inside_a_program()"
    environment = os.environ | {"JAX_ENABLE_X64": "1", "PYTHONPATH": os.path.dirname(__file__)}
    assert "backend_optimization_level" not in environment.get("XLA_FLAGS", "")
    found = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, env=environment, check=False)
    assert found.returncode == 0, found.stderr


def constants_inside_a_program():
    h = jax.random.normal(jax.random.key(0), (300, 32))
    softmax = lambda W, x: dist.Categorical(logits=x @ W)
    W = jax.random.normal(jax.random.key(1), (32, 10))
    F = fb.implicit_fisher(softmax, W, h)
    expected = fb.dense_fisher(softmax, W, h).as_matrix()
    ones = jnp.ones(320)
    for _ in range(3):  # a fresh program each time: not every one is wrong
        product = jax.jit(lambda W, h: fb.implicit_fisher(softmax, W, h) @ jnp.ones((32, 10)))(W, h)
        np.testing.assert_allclose(product.ravel(), expected @ ones, atol=1e-13)
        kept = jax.jit(lambda F: F @ jnp.ones(320))(F)
        np.testing.assert_allclose(kept, expected @ ones, atol=1e-13)
        v = jnp.linspace(-1, 2, 320).at[:10].set(0.0)  # a right side with zeros, which lineax divides by
        solved = jax.jit(lambda F, v: F.solve(v, 0.1))(F, v)
        np.testing.assert_allclose(solved, np.linalg.solve(expected + 0.1 * np.eye(320), v), atol=1e-6)
        at_zero = jax.jit(lambda h: fb.score_covariance(softmax, jnp.zeros((32, 10)), h))(h)
        np.testing.assert_allclose(at_zero, np.kron(h.T @ h / 300, np.eye(10) / 10 - 1 / 100), atol=1e-12)


@pytest.mark.parametrize(
    ("values", "message"),
    [(-1.0, "negative"), (7.0, "large"), ([1.0, 7.0, 2.0], "large"), ([1.0, -1.0], "negative"), (np.nan, "negative")],
)
def test_several_checks_name_the_one_that_failed(values, message):
    check = lambda x: require_all([(x >= 0, "negative"), (True, "known"), (x < 5, "large")], x)
    with pytest.raises(Exception, match=message):
        (jax.jit(check) if np.ndim(values) == 0 else jax.jit(jax.vmap(check)))(jnp.array(values))
    with pytest.raises(ValueError, match="known"):
        jax.jit(lambda x: require_all([(x > 0, "negative"), (False, "known")], x))(1.0)
    np.testing.assert_array_equal(jax.jit(check)(3.0), 3.0)


def test_parameters_that_are_not_finite_are_the_first_thing_named():
    """Under jit, where NaN fails every other check too."""
    x, y = jnp.ones((4, 1)), jnp.ones(4)
    law = lambda t, x: dist.Normal(x @ t, 1.0)
    laws = [fb.Exact(), fb.MonteCarlo(jax.random.key(0), 2), fb.Data(y)]
    any_law = (fb.score_covariance, fb.expected_hessian, fb.dense_fisher, fb.implicit_fisher)
    definitions = [(function, kind) for function in (fb.hellinger_jacobian, fb.kl_curvature) for kind in laws[:1]]
    for function, kind in [(function, kind) for function in any_law for kind in laws] + definitions:
        found = jax.jit(lambda t, function=function, kind=kind: jax.tree.leaves(function(law, t, x, law=kind)))
        with pytest.raises(Exception, match="theta is not finite"):
            jax.block_until_ready(found(jnp.array([jnp.nan])))
