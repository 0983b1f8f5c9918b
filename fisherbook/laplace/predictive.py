"""Predictions of a Laplace posterior: the normal law of the outputs, and the law of new observations."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from ..compilation import run
from ..families import innermost
from ..model import call, require
from .distributions import DrawnMixture, EqualMixture
from .forms import joint_covariance, moments
from .outputs import Head, find_head, read, rebuild

CLASSES = (dist.CategoricalLogits, dist.CategoricalProbs)
METHODS = ("linear", "probit", "bridge", "linear_samples", "samples")


def output_distribution(posterior: Any, x: Any, joint: bool) -> Any:
    head = find_head(posterior.model, posterior.mean, x)
    return _normal(*_moments(posterior, x, head, joint))


def _moments(posterior: Any, x: Any, head: Head, joint: bool = False) -> tuple[jax.Array, jax.Array]:
    """Mean and covariance of the linearised outputs: [n, q] and [n, q, q], or of all inputs together."""
    if not joint:
        return moments(posterior.model, posterior.precision, x, head)
    mean = read(posterior.model, posterior.mean, x, head).ravel()
    return mean, joint_covariance(posterior.model, posterior.precision, x, head)


def predictive(posterior: Any, x: Any, method: str | None, key: Any, draws: int, joint: bool) -> Any:
    if method not in (None, *METHODS):
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if joint and method not in (None, "linear"):
        raise ValueError(f"joint=True needs method='linear', got {method!r}")
    if method == "samples":
        return _sampled(posterior, x, _checked(method, key, draws), draws)
    head = find_head(posterior.model, posterior.mean, x)
    names = [o.name for o in head.outputs]
    inner = innermost(call(posterior.model, posterior.mean, x))
    linear = type(inner) in (dist.Normal, dist.MultivariateNormal) and names == ["loc"]
    classes = type(inner) in CLASSES  # itself: a subclass may have other parameters
    binary = isinstance(inner, (dist.BernoulliLogits, dist.BernoulliProbs)) and not head.events
    named = classes or binary
    fits = {"linear": linear, "probit": named, "bridge": named, "linear_samples": True, "samples": True}
    if method is None:
        method = next(m for m in METHODS if fits[m])
    if not fits[method]:
        can = ", ".join(m for m in METHODS if fits[m])
        raise ValueError(
            f"method={method!r} does not fit {type(inner).__name__} whose {', '.join(names)} move: use {can}"
        )
    if joint and method != "linear":
        raise ValueError(f"joint=True needs method='linear', got {method!r}")
    if method == "linear_samples":
        key = _checked(method, key, draws)
        outputs = _draws(draws, *_moments(posterior, x, head), key)
        return _mixture(posterior, x, head, outputs, classes)
    mean, covariance = _moments(posterior, x, head, joint)
    if method == "linear":
        scalar = not (inner.event_shape or head.events or joint)
        return _normal(mean, covariance + _noise(inner, mean, joint), scalar)
    if method == "bridge":
        mean, covariance = (mean, covariance) if classes else _two_classes(mean, covariance)
        alpha, fine = _bridge(mean, covariance)
        hint = "method='bridge' needs logits that all vary, also when their sum is held: use probit or linear_samples"
        probs = require(fine, alpha / jnp.sum(alpha, -1, keepdims=True), hint)
        return dist.Categorical(probs=probs) if classes else dist.Bernoulli(probs=probs[..., 1])
    return (dist.Categorical if classes else dist.Bernoulli)(probs=_probit(classes, mean, covariance))


def _checked(method: str, key: Any, draws: int) -> Any:
    if key is None:
        raise ValueError(f"method={method!r} draws: pass key=")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    return key


def _noise(inner: Any, mean: jax.Array, joint: bool) -> jax.Array:
    """The covariance of the observations given the outputs, in the form of the outputs' covariance."""
    if type(inner) is dist.Normal:
        noise = jnp.broadcast_to(inner.scale, inner.batch_shape).reshape(mean.shape) ** 2
        return noise[..., None] * jnp.eye(mean.shape[-1])
    blocks = jnp.broadcast_to(inner.covariance_matrix, (*inner.batch_shape, *inner.event_shape, inner.event_shape[-1]))
    if not joint:
        return blocks.reshape(*mean.shape, mean.shape[-1])
    return jax.scipy.linalg.block_diag(*blocks.reshape(-1, *blocks.shape[-2:]))


# compiled once for all outputs of these shapes, as no model is called in them


@partial(jax.jit, static_argnums=0)
def _probit(classes: bool, mean: jax.Array, covariance: jax.Array) -> jax.Array:
    """About the mean probabilities of normal logits: those of the logits divided by sqrt(1 + pi/8 variance)."""
    logits = mean / jnp.sqrt(1 + jnp.pi / 8 * jnp.diagonal(covariance, axis1=-2, axis2=-1))
    return jax.nn.softmax(logits) if classes else jax.nn.sigmoid(logits[..., 0])


@jax.jit
def _bridge(mean: jax.Array, covariance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The Dirichlet law that the Laplace bridge assigns to normal logits, given that their sum is zero.

    And whether each of them varies then, without which there is none.
    """
    K, to_sum = mean.shape[-1], jnp.sum(covariance, -1)
    total = jnp.sum(to_sum, -1)[..., None]
    whole = jnp.trace(covariance, axis1=-2, axis2=-1)[..., None]
    rounding = 100 * K * jnp.finfo(mean.dtype).eps * whole
    varies = total > rounding  # else the sum is a constant already
    share = jnp.where(varies, to_sum / jnp.where(varies, total, 1), 1 / K)
    mean = mean - share * jnp.sum(mean, -1, keepdims=True)
    variance = jnp.diagonal(covariance, axis1=-2, axis2=-1) - jnp.where(varies, to_sum * share, 0)
    alpha = (1 - 2 / K + jnp.exp(mean) / K**2 * jnp.sum(jnp.exp(-mean), -1, keepdims=True)) / variance
    return alpha, jnp.all(variance > rounding)


def _two_classes(mean: jax.Array, covariance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits of two classes, whose sum is zero, from the logit of the second."""
    return mean * jnp.array([-0.5, 0.5]), covariance * jnp.array([[0.25, -0.25], [-0.25, 0.25]])


@jax.jit
def _root(covariance: jax.Array) -> jax.Array:
    """A triangular root of covariances [..., q, q], of which some may be singular."""
    limits = jnp.finfo(covariance.dtype)
    tiny = limits.eps * jnp.trace(covariance, axis1=-2, axis2=-1)[..., None, None] + limits.tiny
    return jnp.linalg.cholesky(covariance + tiny * jnp.eye(covariance.shape[-1]))


@partial(jax.jit, static_argnums=0)
def _draws(count: int, mean: jax.Array, covariance: jax.Array, key: jax.Array) -> jax.Array:
    """[n, count, q] from the normal laws of n outputs, whose covariances may be singular."""
    values, vectors = jnp.linalg.eigh(covariance)
    white = jax.random.normal(key, (len(mean), count, mean.shape[-1]), mean.dtype)
    return mean[:, None] + jnp.einsum("nij,nsj->nsi", vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None], white)


def _normal(mean: jax.Array, covariance: jax.Array, scalar: bool = False) -> Any:
    if scalar:
        return dist.Normal(mean[..., 0], jnp.sqrt(covariance[..., 0, 0]))
    return _multivariate(mean, covariance)


@jax.jit
def _multivariate(mean: jax.Array, covariance: jax.Array) -> Any:
    return dist.MultivariateNormal(mean, scale_tril=_root(covariance))


def _mixture(posterior: Any, x: Any, head: Head, outputs: jax.Array, classes: bool) -> Any:
    """An equal-weight mixture of the laws at drawn outputs [n, draws, q]."""
    parts = lambda mean, x, outputs: rebuild(posterior.model, mean, x, head, outputs)
    if classes:  # a mixture of class probabilities is their mean
        return dist.Categorical(probs=run(lambda *args: jnp.mean(parts(*args).probs, -2), posterior.mean, x, outputs))
    return EqualMixture(parts(posterior.mean, x, outputs), 0 if x is None else 1)


def _sampled(posterior: Any, x: Any, key: Any, draws: int) -> Any:
    """An equal-weight mixture of the model's own laws at drawn parameters."""
    thetas = posterior.sample(key, (draws,))
    if type(call(posterior.model, posterior.mean, x)) in CLASSES:
        of_classes = lambda theta, x: call(posterior.model, theta, x).probs
        total = lambda thetas, x: jnp.mean(jax.lax.map(lambda theta: of_classes(theta, x), thetas, batch_size=32), 0)
        return dist.Categorical(probs=run(total, thetas, x))
    return DrawnMixture(jax.vmap(lambda theta: call(posterior.model, theta, x))(thetas), draws)
