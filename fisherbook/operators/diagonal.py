"""The diagonal of the Fisher information."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from ..compilation import run
from ..expectation import Rows
from ..law import Exact, Law
from ..model import Model, is_traced, require
from ..root import Root, leaf_rows, linearize, row_shape, transpose
from . import layered
from .base import Fisher
from .dense import law_name
from .row_blocks import BLOCK, over_blocks
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
    as much as one gradient for each outcome. Where rows of R have to be formed, no more than 2^21 of their entries are
    held at a time, or, of a larger model, one row.

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
    r = row_shape(root)
    if r < root.d and r * root.d > BLOCK:  # even of one input
        return over_blocks(root, _row_by_row, root.n * root.d)
    squares = lambda part: [jnp.sum(rows**2, (0, 1)) for rows in leaf_rows(part)]
    return jnp.concatenate(over_blocks(root, squares, root.n * r * root.d))


def _row_by_row(root: Root) -> jax.Array:
    """The same with one row of R at a time for each input."""

    def of_input(rows: Rows) -> jax.Array:
        linear, flat = linearize(replace(root, rows=rows)), root.flat
        form = jax.eval_shape(linear, flat)
        back = transpose(linear, flat)
        add = lambda total, u: (total + back(u.reshape(form.shape)) ** 2, None)
        return jax.lax.scan(add, jnp.zeros_like(flat), jnp.eye(form.size, dtype=form.dtype))[0]

    if root.rows.x is None:
        return of_input(root.rows)
    return jnp.sum(jax.vmap(of_input)(jax.tree.map(lambda a: jnp.asarray(a)[:, None], root.rows)), 0)


def squared_norm(root: Root) -> jax.Array:
    """The sum of squares of R, which is the trace of F."""
    layers = layered.layers_of(root)
    if layers is not None and not layered.shared(layers):
        return layered.trace(root, layers)
    return jnp.sum(squared_columns(root))
