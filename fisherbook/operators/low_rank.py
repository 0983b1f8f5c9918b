"""The leading eigenvectors of the Fisher information, and how much of its trace they leave out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from ..batches import Batches
from ..compilation import run
from ..law import Exact, Law
from ..model import Model, require
from ..root import CAP, Root, dense_rows, linearize, make_root, residuals, row_shape, transpose
from .base import Fisher, condition
from .dense import law_name
from .diagonal import squared_norm
from .factor import cholesky
from .row_blocks import over_blocks
from .streams import Passes, mean_over_rows, unit
from .woodbury import Thin

RANK, OVERSAMPLING, ROUNDS = 100, 10, 2


class LowRankFisher(Fisher):
    """F restricted to its leading eigenvectors, U diag(s) U^T; `discarded` is the trace of what it leaves out.

    Solves, determinants and draws of F + damping are exact for the restricted F; they need damping > 0 where the rank
    is below d.
    """

    vectors: jax.Array  # [d, k]
    values: jax.Array  # [k], from the largest down
    left_out: jax.Array  # the trace, without the scale

    def _multiply(self, V: jax.Array) -> jax.Array:
        return self.vectors @ (self.values[:, None] * (self.vectors.T @ V))

    def _diagonal(self) -> jax.Array:
        return self.vectors**2 @ self.values

    def eigenvalues(self) -> jax.Array:
        """The leading eigenvalues [k], from the largest down."""
        return self.scale * self.values

    @property
    def discarded(self) -> jax.Array:
        """The trace that is left out, a scalar."""
        return self.scale * self.left_out

    @property
    def _full(self) -> bool:
        return self.vectors.shape[1] == self.d

    def _thin(self, damping: jax.Array) -> Thin:
        if damping.ndim == 0:  # in these units the columns are orthonormal as they are
            return Thin(jnp.sqrt(damping), self.vectors, self.values / damping, self.d)
        return Thin.of(self.vectors * jnp.sqrt(self.values), damping)

    def _positive(self, damping: jax.Array) -> jax.Array:
        k = self.vectors.shape[1]
        hint = (
            f"a Fisher information of rank {k} is singular in {self.d} parameters: pass damping > 0, or a higher rank="
        )
        return require(jnp.all(damping > 0), damping, hint)

    def _dense(self, damping: jax.Array) -> jax.Array:
        M = self._multiply(jnp.eye(self.d, dtype=self.dtype))
        return cholesky(M + damping * jnp.eye(self.d, dtype=M.dtype), lambda: self.names)

    def _solve(self, V: jax.Array, damping: jax.Array) -> jax.Array:
        if self._full:
            return jax.scipy.linalg.cho_solve((self._dense(damping), True), V)
        return self._thin(self._positive(damping)).solve(V)

    def _inverse_diagonal(self, damping: jax.Array) -> jax.Array:
        if self._full:
            return super()._inverse_diagonal(damping)
        return run(lambda F, damping: F._thin(damping).inverse_diagonal(), self, self._positive(damping))

    def _logdet(self, damping: jax.Array) -> jax.Array:
        if self._full:
            return 2 * jnp.sum(jnp.log(jnp.diagonal(self._dense(damping))))
        return self._thin(self._positive(damping)).logdet()

    def _inverse_root(self, white: jax.Array, damping: jax.Array) -> jax.Array:
        if self._full:
            return jax.scipy.linalg.solve_triangular(self._dense(damping), white, lower=True, trans=1)
        return self._thin(self._positive(damping)).inverse_root(white)

    def _numbers(self) -> list[tuple[str, str]]:
        left_out = float(self.left_out / (self.left_out + jnp.sum(self.values)))
        largest = self.eigenvalues()
        spread = f"{float(largest[0]):.3g} to {float(largest[-1]):.3g}"
        return [
            *super()._numbers(),
            ("rank", f"{len(self.values)}, eigenvalues {spread}"),
            ("trace left out", f"{left_out:.3g} of it"),
        ]

    def _condition(self) -> str:
        return condition(self.values, self.d)


def low_rank_fisher(
    model: Model,
    theta: Any,
    x: Any = None,
    *,
    law: Law = Exact(),
    rank: int = RANK,  # noqa: B008
) -> LowRankFisher:
    r"""Compute the leading eigenvectors of the Fisher information from its root, without forming it.

    Where R has at most d rows and 2^26 entries it is exact: R is formed, and its singular vectors are taken. Otherwise
    (more rows, a larger R, or `Batches`) a randomised range finder with two rounds of power iteration; its error is of
    the order of the eigenvalue after the last one kept. `discarded` is the trace that is left out, exactly.

    Args:
        model: `model(theta)` or `model(theta, x)`, a distribution.
        theta: parameter pytree with d scalars, interior to its domain; units u.
        x: inputs with leading axis n, or `Batches` of them, for a conditional model; F is the mean over them.
        law: `Exact()`, `MonteCarlo(key, draws)` with error O(1/sqrt(draws)), or `Data(y)`, the empirical Fisher.
        rank: number of eigenvectors kept, at most d and the number of rows.

    Returns:
        An operator of shape [d, d] in 1/u^2 with `values`, `vectors` and `discarded`.

    Raises:
        ValueError: as `score_covariance`; `rank` is below 1; a solve without damping where the rank is below d.

    Example:
        >>> import numpyro.distributions as dist
        >>> x = jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> F = low_rank_fisher(lambda t, x: dist.Normal(x @ t, 1.0), jnp.zeros(3), x, rank=1)
        >>> print(F.eigenvalues(), F.discarded)  # X^T X / 2 has eigenvalues 2, 1/2, 0
        [2.] 0.5

    Derived in the chapter "Fisher at scale". Source: Halko, Martinsson and Tropp (2011), section 4.5.
    """
    if not isinstance(rank, (int, np.integer)) or rank < 1:
        raise ValueError(f"rank must be a whole number of at least 1, got {rank}")
    if isinstance(x, Batches):
        checked, values, vectors, trace = _streamed(model, theta, x, law, rank)
    else:
        root = make_root(model, theta, x, law=law)
        rows = root.n * row_shape(root)
        k, small = min(rank, root.d, rows), min(rows, root.d)
        take = _from_gram if rows <= root.d and rows * root.d <= CAP else _from_products
        values, vectors, trace = run(lambda r: take(r, k, min(small, k + OVERSAMPLING)), root)
        checked = root.theta
    left_out = jnp.maximum(trace - jnp.sum(values), 0)
    return LowRankFisher(checked, unit(x, values), law_name(law), vectors, values, left_out)


def _streamed(model: Model, theta: Any, x: Batches, law: Law, rank: int) -> tuple[Any, ...]:
    passes = Passes()
    checked, trace = mean_over_rows(model, theta, x, law, lambda root: run(squared_norm, root), passes)
    flat = ravel_pytree(checked)[0]
    mean = lambda Q: mean_over_rows(model, checked, x, law, lambda root: run(product, root, Q), passes)[1]
    k = min(rank, flat.size)
    return checked, *_randomised(mean, flat, k, min(flat.size, k + OVERSAMPLING)), trace


def _from_gram(root: Root, k: int, _: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    R = dense_rows(root).reshape(-1, root.d)
    _, s, Vt = jnp.linalg.svd(R, full_matrices=False)
    return s[:k] ** 2, Vt[:k].T, jnp.sum(s**2)


def _from_products(root: Root, k: int, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    return *_randomised(lambda Q: product(root, Q), root.flat, k, size), squared_norm(root)


def product(root: Root, Q: jax.Array) -> jax.Array:
    """F Q for Q [d, k], a block of inputs at a time."""
    flat = root.flat

    def block(part: Root) -> jax.Array:
        linear = linearize(part)
        return jax.vmap(lambda v: transpose(linear, flat)(linear(v)), 1, 1)(Q)

    return over_blocks(root, block, residuals(root) * Q.shape[1])


def _randomised(
    product: Callable[[jax.Array], jax.Array], flat: jax.Array, k: int, size: int
) -> tuple[jax.Array, jax.Array]:
    Q = jnp.asarray(np.random.default_rng(0).standard_normal((flat.size, size)), flat.dtype)
    for _ in range(ROUNDS + 1):
        Q = jnp.linalg.qr(product(jnp.linalg.qr(Q)[0]))[0]
    small = Q.T @ product(Q)
    values, vectors = jnp.linalg.eigh((small + small.T) / 2)
    return jnp.maximum(values[::-1][:k], 0), (Q @ vectors[:, ::-1])[:, :k]
