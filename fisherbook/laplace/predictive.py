"""Predictions of a Laplace posterior: the normal law of the outputs, and the law of new observations."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from ..compilation import run
from ..families import innermost
from ..model import call
from .distributions import EqualMixture
from .forms import joint_covariance, moments
from .outputs import Head, find_head, read, rebuild

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
    head = find_head(posterior.model, posterior.mean, x)
    names = [o.name for o in head.outputs]
    inner = innermost(call(posterior.model, posterior.mean, x))
    linear = type(inner) is dist.Normal and names == ["loc"]
    classes = isinstance(inner, (dist.CategoricalLogits, dist.CategoricalProbs))
    binary = isinstance(inner, (dist.BernoulliLogits, dist.BernoulliProbs)) and not head.events
    fits = {"linear": linear, "probit": classes or binary, "bridge": classes, "linear_samples": True, "samples": True}
    if method is None:
        method = next(m for m in METHODS if fits[m])
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not fits[method]:
        can = ", ".join(m for m in METHODS if fits[m])
        raise ValueError(
            f"method={method!r} does not fit {type(inner).__name__} whose {', '.join(names)} move: use {can}"
        )
    if joint and method != "linear":
        raise ValueError(f"joint=True needs method='linear', got {method!r}")
    if method in ("linear_samples", "samples"):
        if key is None:
            raise ValueError(f"method={method!r} draws: pass key=")
        return _mixture(posterior, x, head, method, key, draws, classes)
    mean, covariance = _moments(posterior, x, head, joint)
    if method == "linear":
        noise = jnp.broadcast_to(inner.scale, inner.batch_shape).reshape(mean.shape) ** 2
        return _normal(mean, covariance + noise[..., None] * jnp.eye(mean.shape[-1]), scalar=not (head.events or joint))
    if method == "bridge":
        return dist.Categorical(probs=_bridge(mean, covariance))
    return (dist.Categorical if classes else dist.Bernoulli)(probs=_probit(classes, mean, covariance))


# compiled once for all outputs of these shapes, as no model is called in them


@partial(jax.jit, static_argnums=0)
def _probit(classes: bool, mean: jax.Array, covariance: jax.Array) -> jax.Array:
    """About the mean probabilities of normal logits: those of the logits divided by sqrt(1 + pi/8 variance)."""
    logits = mean / jnp.sqrt(1 + jnp.pi / 8 * jnp.diagonal(covariance, axis1=-2, axis2=-1))
    return jax.nn.softmax(logits) if classes else jax.nn.sigmoid(logits[..., 0])


@jax.jit
def _bridge(mean: jax.Array, covariance: jax.Array) -> jax.Array:
    """Mean of the Dirichlet law that the Laplace bridge assigns to normal logits, given that their sum is zero."""
    K, to_sum = mean.shape[-1], jnp.sum(covariance, -1)
    total = jnp.sum(to_sum, -1)[..., None]
    share = jnp.where(total > 0, to_sum / jnp.where(total > 0, total, 1), 1 / K)
    mean = mean - share * jnp.sum(mean, -1, keepdims=True)
    variance = jnp.diagonal(covariance, axis1=-2, axis2=-1) - to_sum * share
    alpha = (1 - 2 / K + jnp.exp(mean) / K**2 * jnp.sum(jnp.exp(-mean), -1, keepdims=True)) / variance
    return alpha / jnp.sum(alpha, -1, keepdims=True)


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


def _mixture(posterior: Any, x: Any, head: Head, method: str, key: Any, draws: int, classes: bool) -> Any:
    """An equal-weight mixture of the laws at drawn outputs [n, draws, q]."""
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")

    def whole(thetas: Any, x: Any) -> jax.Array:
        each = lambda theta: read(posterior.model, theta, x, head)
        return jnp.swapaxes(jax.lax.map(each, thetas, batch_size=32), 0, 1)

    if method == "linear_samples":
        outputs = _draws(draws, *_moments(posterior, x, head), key)
    else:
        outputs = run(whole, posterior.sample(key, (draws,)), x)
    parts = lambda mean, x, outputs: rebuild(posterior.model, mean, x, head, outputs)
    if classes:  # a mixture of class probabilities is their mean
        return dist.Categorical(probs=run(lambda *args: jnp.mean(parts(*args).probs, -2), posterior.mean, x, outputs))
    return EqualMixture(parts(posterior.mean, x, outputs), 0 if x is None else 1)
