"""Distributions: a log-density of one's own as a model, and some of numpyro's put right."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.special import gammaln


class BernoulliLogits(dist.BernoulliLogits):
    """numpyro 0.22 differentiates |logits| and clip(logits, 0): at logits = 0 its score of y = 0 is 0, not -1/2."""

    def log_prob(self, value: Any, intermediates: Any = None) -> jax.Array:
        del intermediates
        value = jnp.asarray(value)
        sign = jnp.where(value == 1, 1.0, -1.0).astype(jnp.result_type(self.logits, float))
        return jax.nn.log_sigmoid(sign * self.logits)


class BinomialLogits(dist.BinomialLogits):
    """As `BernoulliLogits`: smooth in the logits at 0."""

    def log_prob(self, value: Any, intermediates: Any = None) -> jax.Array:
        del intermediates
        n = jnp.asarray(self.total_count, jnp.result_type(float))
        ways = gammaln(n + 1) - gammaln(value + 1) - gammaln(n - value + 1)
        return ways + value * jax.nn.log_sigmoid(self.logits) + (n - value) * jax.nn.log_sigmoid(-self.logits)


class GammaPoisson(dist.GammaPoisson):
    """`jax.scipy.special.betaln` is wrong by up to 1e-6 where an argument is 8 or more; so are the masses it gives."""

    def log_prob(self, value: Any, intermediates: Any = None) -> jax.Array:
        del intermediates
        a, rate, y = self.concentration, jnp.asarray(self.rate), jnp.asarray(value, jnp.result_type(float))
        ways = gammaln(a + y) - gammaln(a) - gammaln(y + 1)
        return ways - a * jnp.log1p(1 / rate) - y * jnp.log1p(rate)


class BetaBinomial(dist.BetaBinomial):
    """As `GammaPoisson`: the beta functions by gammaln."""

    def log_prob(self, value: Any, intermediates: Any = None) -> jax.Array:
        del intermediates
        n, y = jnp.asarray(self.total_count, jnp.result_type(float)), jnp.asarray(value, jnp.result_type(float))
        a, b = self.concentration1, self.concentration0
        ways = gammaln(n + 1) - gammaln(y + 1) - gammaln(n - y + 1)
        return ways + _betaln(y + a, n - y + b) - _betaln(a, b)


def _betaln(a: Any, b: Any) -> jax.Array:
    return gammaln(a) + gammaln(b) - gammaln(a + b)


def log_density(distribution: Any, y: Any) -> jax.Array:
    """log p(y), in silence where y is outside the support: such outcomes are ours to weigh or to refuse."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Out-of-support values")
        return jnp.asarray(distribution.log_prob(y))


def adapt(distribution: Any) -> Any:
    """Exchange the distributions whose log_prob or its derivative is wrong somewhere for those above."""
    if type(distribution) is dist.BernoulliLogits:
        return BernoulliLogits(distribution.logits)
    if type(distribution) is dist.BinomialLogits:
        fixed = BinomialLogits(distribution.logits, distribution.total_count)
        return fixed
    if type(distribution) in (dist.GammaPoisson, dist.NegativeBinomial2, dist.NegativeBinomialProbs):
        return GammaPoisson(distribution.concentration, distribution.rate)
    if type(distribution) is dist.BetaBinomial:
        return BetaBinomial(distribution.concentration1, distribution.concentration0, distribution.total_count)
    if type(distribution) is dist.Independent:
        inner = adapt(distribution.base_dist)
        if inner is not distribution.base_dist:
            return dist.Independent(inner, distribution.reinterpreted_batch_ndims)
    return distribution


class Table:
    """A finite support, given by its outcomes [k, *event]."""

    is_discrete = True

    def __init__(self, outcomes: jax.Array) -> None:
        self.outcomes = outcomes

    def __call__(self, y: Any) -> jax.Array:
        event = self.outcomes.ndim - 1
        equal = jnp.asarray(y)[..., None, :] == self.outcomes if event == 1 else None
        if event == 0:
            return jnp.any(jnp.asarray(y)[..., None] == self.outcomes, -1)
        if equal is None:
            raise ValueError("outcomes must be numbers or vectors: an array [k] or [k, event]")
        return jnp.any(jnp.all(equal, -1), -1)

    def __repr__(self) -> str:
        return f"the {len(self.outcomes)} given outcomes"


@jax.tree_util.register_pytree_node_class
class OwnDensity:
    """What a model made by `from_log_prob` returns."""

    def __init__(self, theta: Any, x: Any, parts: tuple[Any, ...]) -> None:
        self.theta, self.x, self.parts = theta, x, parts

    def tree_flatten(self) -> tuple[tuple[Any, Any], tuple[Any, ...]]:
        return (self.theta, self.x), self.parts

    @classmethod
    def tree_unflatten(cls, parts: tuple[Any, ...], children: tuple[Any, Any]) -> OwnDensity:
        return cls(*children, parts)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return () if self.x is None else jnp.shape(jax.tree.leaves(self.x)[0])[:1]

    @property
    def support(self) -> Any:
        support = self.parts[1]
        if callable(support) and not hasattr(support, "is_discrete"):
            return support(self.theta)
        return support

    @property
    def outcomes(self) -> jax.Array | None:
        return getattr(self.parts[1], "outcomes", None)

    @property
    def event_shape(self) -> tuple[int, ...]:
        return () if self.outcomes is None else self.outcomes.shape[1:]

    def expand(self, batch_shape: tuple[int, ...]) -> OwnDensity:
        """One law for each of batch_shape = (n,) rows, as numpyro's distributions do."""
        log_prob, support, location, scale, draw = self.parts
        parts = (
            lambda theta, y, row: log_prob(theta, y),
            support,
            (lambda theta, row: location(theta)) if callable(location) else location,
            (lambda theta, row: scale(theta)) if callable(scale) else scale,
            None if draw is None else (lambda key, theta, row: draw(key, theta)),
        )
        return OwnDensity(self.theta, jnp.zeros(batch_shape), parts)

    def _hint(self, value: Any) -> Any:
        if not callable(value):
            return value
        return value(self.theta) if self.x is None else value(self.theta, self.x)

    @property
    def mean(self) -> Any:
        return self._hint(self.parts[2])

    @property
    def variance(self) -> Any:
        scale = self._hint(self.parts[3])
        return None if scale is None else jnp.asarray(scale) ** 2

    def log_prob(self, y: Any) -> jax.Array:
        y = jnp.asarray(y)
        lead = y.shape[: y.ndim - len(self.event_shape)]
        if self.x is None:
            one: Callable[..., Any] = lambda yi: self.parts[0](self.theta, yi)
            for _ in lead:
                one = jax.vmap(one)
            value = one(y)
        else:
            row: Callable[..., Any] = jax.vmap(lambda yi, xi: self.parts[0](self.theta, yi, xi))
            for _ in lead[1:]:
                row = jax.vmap(row, in_axes=(0, None))
            value = row(jnp.broadcast_to(y, (*lead[:-1], *self.batch_shape, *self.event_shape)), self.x)
        return value

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        draw = self.parts[4]
        shape = (*sample_shape, *self.batch_shape)
        if draw is None and self.outcomes is not None:
            log_p = self.log_prob(self.outcomes[(slice(None), *[None] * len(self.batch_shape))])
            picked = jax.random.categorical(key, jnp.moveaxis(log_p, 0, -1), shape=shape)
            return self.outcomes[picked]
        if draw is None:
            raise ValueError(
                "MonteCarlo needs a sampler: pass from_log_prob(..., sample=lambda key, theta: one outcome)"
            )
        if self.x is None:
            keys = jax.random.split(key, shape)
            one: Callable[..., Any] = lambda k: draw(k, self.theta)
            for _ in shape:
                one = jax.vmap(one)
            return one(keys)
        keys = jax.random.split(key, shape)
        row: Callable[..., Any] = jax.vmap(lambda k, xi: draw(k, self.theta, xi))
        for _ in sample_shape:
            row = jax.vmap(row, in_axes=(0, None))
        return row(keys, self.x)


def from_log_prob(
    log_prob: Callable[..., Any],
    *,
    support: Any = dist.constraints.real,
    location: Any = None,
    scale: Any = None,
    sample: Callable[..., Any] | None = None,
) -> Callable[..., OwnDensity]:
    r"""Make a model of a log-density of one's own.

    Args:
        log_prob: `log_prob(theta, y)` or `log_prob(theta, y, x)` for *one* observation y (and one row x); returns
            the normalised log-density, a scalar.
        support: where y lives: a numpyro constraint, a function of theta that returns one, or the array
            [k] or [k, event] of all outcomes.
        location: centre of the density, a number or a function of (theta[, x]); searched for by default.
        scale: its width, likewise.
        sample: `sample(key, theta)` or `sample(key, theta, x)`, one outcome; only `MonteCarlo` needs it, and not
            for a finite support.

    Returns:
        A model: `model(theta)` or `model(theta, x)` is a distribution.

    Raises:
        TypeError: `log_prob` is not callable.

    Example:
        >>> from fisherbook import score_covariance
        >>> model = from_log_prob(lambda t, y: -0.5 * (y - t) ** 2 - 0.5 * jnp.log(2 * jnp.pi))
        >>> print(f"{score_covariance(model, 0.3).item():.4f}")
        1.0000

    Derived in the chapter "Information is the covariance of the score". Source: the definition of a density.
    """
    if not callable(log_prob):
        raise TypeError(f"log_prob must be a function of (theta, y) or (theta, y, x), got {log_prob!r}")
    if not callable(support):
        support = Table(jnp.asarray(support))
    parts = (log_prob, support, location, scale, sample)

    def model(theta: Any, x: Any = None) -> OwnDensity:
        return OwnDensity(theta, x, parts)

    return model
