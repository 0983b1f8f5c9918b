"""The Fisher information as a matrix."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..compilation import run
from ..law import Data, Exact, Law
from ..model import Model
from ..root import Root, leaf_rows, row_shape
from ..score import weighted_score_covariance
from . import layered, tiles
from .base import SHOWN, UNKNOWN, Fisher, condition
from .factor import cholesky
from .row_blocks import over_blocks
from .streams import mean_over_rows, unit


class DenseFisher(Fisher):
    """F as a matrix [d, d]: every method is exact."""

    matrix: jax.Array

    def _multiply(self, V: jax.Array) -> jax.Array:
        return self.matrix @ V

    def as_matrix(self) -> jax.Array:
        return self.scale * self.matrix

    def _diagonal(self) -> jax.Array:
        return jnp.diagonal(self.matrix)

    def _factor(self, damping: jax.Array) -> jax.Array:
        return cholesky(self.matrix + damping * jnp.eye(self.d, dtype=self.matrix.dtype), lambda: self.names)

    def _solve(self, V: jax.Array, damping: jax.Array) -> jax.Array:
        return jax.scipy.linalg.cho_solve((self._factor(damping), True), V)

    def _logdet(self, damping: jax.Array) -> jax.Array:
        return 2 * jnp.sum(jnp.log(jnp.diagonal(self._factor(damping))))

    def _inverse_root(self, white: jax.Array, damping: jax.Array) -> jax.Array:
        return jax.scipy.linalg.solve_triangular(self._factor(damping), white, lower=True, trans=1)

    def _plus(self, other: Fisher) -> Fisher | None:
        if not isinstance(other, DenseFisher):
            return None
        return DenseFisher(self.theta, jnp.ones((), self.dtype), self.law, self.as_matrix() + other.as_matrix())

    def average(self, newer: Fisher, weight: Any) -> Fisher:
        old, new = self.as_matrix(), newer.as_matrix()
        return DenseFisher(newer.theta, jnp.ones((), self.dtype), self.law, (1 - weight) * old + weight * new)

    def _condition(self) -> str:
        return condition(jnp.linalg.eigvalsh(self.matrix), self.d) if self.d <= SHOWN else UNKNOWN


def dense_fisher(model: Model, theta: Any, x: Any = None, *, law: Law = Exact()) -> DenseFisher:
    r"""Form the Fisher information as a matrix, :math:`F = R^\top R`, per observation.

    Where the model has linear layers (`linear_layers`) the block of two of them is computed from activations a and
    backward signals g as :math:`\sum_n (a_n^\top a'_n) \otimes (g_n^\top g'_n)`, which costs the same for any number of
    outcomes. Inputs are taken in blocks that hold at most 2^26 scalars beside F (half a gigabyte in float64).

    Args:
        model: `model(theta)` or `model(theta, x)`, a distribution.
        theta: parameter pytree with d scalars, interior to its domain; units u.
        x: inputs with leading axis n, or `Batches` of them, for a conditional model; F is the mean over them.
        law: `Exact()`, `MonteCarlo(key, draws)` with error O(1/sqrt(draws)), or `Data(y)`, the empirical Fisher.

    Returns:
        An operator of shape [d, d] in 1/u^2, with every method exact.

    Raises:
        ValueError: as `score_covariance`; a solve raises where F + damping is singular.

    Example:
        >>> import numpyro.distributions as dist
        >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
        >>> F = dense_fisher(lambda t, x: dist.Poisson(jnp.exp(x @ t)), jnp.zeros(2), x)
        >>> print(F.as_matrix())  # X^T X / n at rate 1
        [[1. 1.]
         [1. 2.]]

    Derived in the chapter "Fisher at scale". Source: Martens (2020), section 8.
    """

    def matrix_of(root: Root) -> jax.Array:
        if root.varying is None and root.plan.exact:
            return weighted_score_covariance(model, theta, root.rows.x, law, None)
        return run(gram_of_columns, root)

    theta, matrix = mean_over_rows(model, theta, x, law, matrix_of)
    return DenseFisher(theta, unit(x, jnp.diagonal(matrix)), law_name(law), matrix)


PIECES, WIDTH = 7, 344  # tiles of R^T R: at most so many across, of about so many columns where there are fewer


def gram_of_columns(root: Root) -> jax.Array:
    """R^T R, a block of inputs at a time; through the layers where that is less work."""
    layers = layered.layers_of(root)
    if layers is not None and layered.pays(root, layers):
        return layered.matrix(root, layers)
    parts = tiles.cut(root.d, min(PIECES, -(-root.d // WIDTH)))

    edges = [0, *np.cumsum([np.size(leaf) for leaf in jax.tree.leaves(root.theta)]).tolist()]

    def block(part: Root) -> list[jax.Array]:
        R = [jax.lax.collapse(rows, 0, 2) for rows in leaf_rows(part)]
        columns = {i.start: _columns(R, edges, i) for i in parts}
        return tiles.upper(parts, lambda i, j: columns[i.start].T @ columns[j.start])

    found = over_blocks(root, block, root.n * row_shape(root) * root.d, root.d**2)
    return tiles.assemble(found, len(parts))


def _columns(R: list[jax.Array], edges: list[int], part: slice) -> jax.Array:
    """Those columns of R whose leaves are `R` and begin at `edges`."""
    pieces = [
        rows[:, max(a, part.start) - a : min(b, part.stop) - a]
        for rows, (a, b) in zip(R, itertools.pairwise(edges), strict=True)
        if max(a, part.start) < min(b, part.stop)
    ]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, 1)


def law_name(law: Law) -> str:
    return "empirical, Data(y)" if isinstance(law, Data) else type(law).__name__
