"""Every function of theta can be differentiated again: the derivative of F is what geometry needs."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.special import polygamma

import fisherbook as fb

POINTS = jnp.linspace(-1.0, 1.0, 5)


def from_jacobian(model, theta, x=None, **law):
    J = fb.hellinger_jacobian(model, theta, x, **law)
    return 4 * J.T @ J


MODELS = {  # model, theta, x, derivative of F by hand
    "Bernoulli": (lambda t: dist.Bernoulli(probs=t), 0.3, None, -(1 - 0.6) / 0.21**2),
    "Poisson": (lambda t: dist.Poisson(t), 4.0, None, -1 / 16),
    "gamma, shape": (lambda t: dist.Gamma(t, 1.0), 2.0, None, polygamma(2, 2.0)),
    "normal, scale": (lambda t: dist.Normal(0.0, t), 1.5, None, -4 / 1.5**3),
    "logistic regression": (
        lambda t, x: dist.Bernoulli(logits=x * t),
        0.7,
        POINTS,
        # d (p q) / dt = p q (q - p) x, and q - p = -tanh(x t / 2)
        np.mean(-(POINTS**3) * np.tanh(0.35 * POINTS) / (4 * np.cosh(0.35 * POINTS) ** 2)),
    ),
    "pixels": (lambda t: dist.Bernoulli(probs=jnp.full(3, t)).to_event(1), 0.3, None, -3 * (1 - 0.6) / 0.21**2),
}


@pytest.mark.parametrize("definition", [fb.score_covariance, from_jacobian, fb.kl_curvature, fb.expected_hessian])
@pytest.mark.parametrize("name", MODELS)
def test_derivative_of_the_information(name, definition):
    model, theta, x, expected = MODELS[name]
    sign = -1 if definition is fb.expected_hessian else 1
    F = jax.jit(lambda t: sign * definition(model, t, x)[0, 0])
    forward, reverse = jax.jit(jax.jacfwd(F))(theta), jax.jit(jax.grad(F))(theta)
    np.testing.assert_allclose([forward, reverse], expected, rtol=1e-7)


def test_derivative_under_a_sampled_law():
    """The draws stand still and their weights move: unbiased, with the error of a mean of 100 000 draws."""
    model, law = (lambda t: dist.Bernoulli(probs=t)), fb.MonteCarlo(jax.random.key(0), 100_000)
    found = jax.grad(lambda t: fb.score_covariance(model, t, law=law)[0, 0])(0.3)
    assert abs(found + 0.4 / 0.21**2) < 0.3  # 5 sd: each draw of (d/dt log p) s^2 + d s^2 / dt has sd 18


@pytest.mark.parametrize("distance", [fb.kl_divergence, fb.hellinger_distance])
@pytest.mark.parametrize("model", [lambda t: dist.Gamma(t, 1.0), lambda t: dist.Poisson(t)], ids=["gamma", "Poisson"])
def test_gradient_of_a_divergence(distance, model):
    value = jax.jit(lambda a, b: distance(model, a, b))
    found = jax.grad(value, (0, 1))(2.0, 3.0)
    h = 1e-5
    a, b = value(2.0 + h, 3.0) - value(2.0 - h, 3.0), value(2.0, 3.0 + h) - value(2.0, 3.0 - h)
    np.testing.assert_allclose(found, np.array([a, b]) / (2 * h), rtol=1e-7)
