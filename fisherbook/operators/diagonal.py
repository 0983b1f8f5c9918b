"""The diagonal of the Fisher information."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ..compilation import run
from ..law import Exact, Law
from ..model import Model, is_traced, require
from ..root import Root, leaf_rows, row_shape
from . import layered
from .base import Fisher
from .dense import law_name
from .row_blocks import over_blocks
from .streams import mean_over_rows, unit


class DiagonalFisher(Fisher):
    """The exact diagonal of F and nothing beside it: products, solves and draws are those of the diagonal matrix."""

    entries: jax.Array

    def _multiply(self, V: jax.Array) -> jax.Array:
        return self.entries[:, None] * V

    def _diagonal(self) -> jax.Array:
        return self.entries

    def _damped(self, damping: jax.Array) -> jax.Array:
        total = self.entries + damping

        def message() -> str:
            if is_traced(total):
                return "F + damping is singular: pass damping > 0"
            zero = [name for name, value in zip(self.names, total.tolist(), strict=True) if not value > 0][:6]
            return f"F + damping is singular: the information about {', '.join(zero)} is 0; pass damping > 0"

        return require(jnp.all(total > 0), total, message)

    def _solve(self, V: jax.Array, damping: jax.Array) -> jax.Array:
        return V / self._damped(damping)[:, None]

    def _inverse_diagonal(self, damping: jax.Array) -> jax.Array:
        return 1 / self._damped(damping)

    def _logdet(self, damping: jax.Array) -> jax.Array:
        return jnp.sum(jnp.log(self._damped(damping)))

    def _inverse_root(self, white: jax.Array, damping: jax.Array) -> jax.Array:
        return white / jnp.sqrt(self._damped(damping))[:, None]

    def _plus(self, other: Fisher) -> Fisher | None:
        if not isinstance(other, DiagonalFisher):
            return None
        return DiagonalFisher(self.theta, jnp.ones((), self.dtype), self.law, self.diagonal() + other.diagonal())

    def average(self, newer: Fisher, weight: Any) -> Fisher:
        old, new = self.scale * self.entries, newer.diagonal()
        return DiagonalFisher(newer.theta, jnp.ones((), self.dtype), self.law, (1 - weight) * old + weight * new)

    def _condition(self) -> str:
        low, high = float(jnp.min(self.entries)), float(jnp.max(self.entries))
        return f"{high / low:.3g}" if low > 0 else f"singular: rank {int(jnp.sum(self.entries > 0))} of {self.d}"


def diagonal_fisher(model: Model, theta: Any, x: Any = None, *, law: Law = Exact()) -> DiagonalFisher:
    r"""Compute the diagonal of the Fisher information exactly, :math:`F_{ii} = \sum_k R_{ki}^2`, per observation.

    In a linear layer the square of a row of R is the product of squared activations and squared signals, so it costs
    as much as one gradient for each outcome.

    Args:
        model: `model(theta)` or `model(theta, x)`, a distribution.
        theta: parameter pytree with d scalars, interior to its domain; units u.
        x: inputs with leading axis n, or `Batches` of them, for a conditional model; F is the mean over them.
        law: `Exact()`, `MonteCarlo(key, draws)` with error O(1/sqrt(draws)), or `Data(y)`, the empirical Fisher.

    Returns:
        A diagonal operator of shape [d, d] in 1/u^2. It approximates F by leaving out what is beside the diagonal.

    Raises:
        ValueError: as `score_covariance`; a solve raises where an entry of F + damping is 0, and names it.

    Example:
        >>> import numpyro.distributions as dist
        >>> F = diagonal_fisher(lambda t: dist.Normal(t["mean"], t["sd"]), {"mean": 0.0, "sd": 2.0})
        >>> print(F.diagonal().round(4))  # 1 / sd^2, 2 / sd^2
        [0.25 0.5 ]

    Derived in the chapter "Fisher at scale". Source: Kunstner, Balles and Hennig (2019), section 2.
    """
    theta, entries = mean_over_rows(model, theta, x, law, lambda root: run(squared_columns, root))
    return DiagonalFisher(theta, unit(x, entries), law_name(law), entries)


def squared_columns(root: Root) -> jax.Array:
    """Sums of squares of R's columns, a block of inputs at a time; through the layers where there are any."""
    layers = layered.layers_of(root)
    if layers is not None and not layered.shared(layers):
        return layered.diagonal(root, layers)
    scalars = root.n * row_shape(root) * root.d
    squares = lambda part: [jnp.sum(rows**2, (0, 1)) for rows in leaf_rows(part)]
    return jnp.concatenate(over_blocks(root, squares, scalars))


def squared_norm(root: Root) -> jax.Array:
    """The sum of squares of R, which is the trace of F."""
    layers = layered.layers_of(root)
    if layers is not None and not layered.shared(layers):
        return layered.trace(root, layers)
    return jnp.sum(squared_columns(root))
