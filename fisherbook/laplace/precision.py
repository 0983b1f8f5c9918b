"""The precision n F + prior of a posterior, factorised once: solves, determinant, draws, variances."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ..compilation import run
from ..operators.base import Fisher
from ..operators.dense import DenseFisher
from ..operators.factor import cholesky


class Precision(eqx.Module):
    """n F + D for an operator F and a diagonal D, a number or [d]; whatever has the operators' methods may be F."""

    F: Any
    n: jax.Array
    prior: jax.Array

    @property
    def damping(self) -> Any:
        """What the operator adds to F: a number, or one array for each leaf of theta."""
        share = self.prior / self.n
        return share if share.ndim == 0 else jax.flatten_util.ravel_pytree(self.F.theta)[1](share)

    def multiply(self, V: jax.Array) -> jax.Array:
        return self.n * (self.F @ V) + (self.prior if self.prior.ndim == 0 else self.prior[:, None]) * V

    def solve(self, V: jax.Array) -> jax.Array:
        """Covariance times V [d, k]."""
        return self.F.solve(V, self.damping) / self.n

    def logdet(self) -> jax.Array:
        return self.F.logdet(self.damping) + self.F.shape[0] * jnp.log(self.n)

    def draws(self, key: jax.Array, count: int) -> jax.Array:
        """[count, d] from N(0, covariance)."""
        return self.F.sample(key, (count,), self.damping) / jnp.sqrt(self.n)

    def variances(self) -> jax.Array:
        """The diagonal [d] of the covariance."""
        if isinstance(self.F, Fisher):
            return self.F.inverse_diagonal(self.damping) / self.n
        return jnp.diagonal(self.solve(jnp.eye(self.F.shape[0], dtype=self.n.dtype)))

    def forms(self, V: jax.Array) -> jax.Array:
        """V^T covariance V [m, k, k] for V [m, d, k]."""
        m, d, k = V.shape
        SV = self.solve(jnp.moveaxis(V, 1, 0).reshape(d, m * k)).reshape(d, m, k)
        return jnp.einsum("mdk,dml->mkl", V, SV)


class DensePrecision(Precision):
    """The same with the Cholesky factor of n F + D at hand."""

    L: jax.Array

    def solve(self, V: jax.Array) -> jax.Array:
        return jax.scipy.linalg.cho_solve((self.L, True), V)

    def logdet(self) -> jax.Array:
        return 2 * jnp.sum(jnp.log(jnp.diagonal(self.L)))

    def draws(self, key: jax.Array, count: int) -> jax.Array:
        white = jax.random.normal(key, (len(self.L), count), self.L.dtype)
        return jax.scipy.linalg.solve_triangular(self.L, white, lower=True, trans=1).T

    def variances(self) -> jax.Array:
        return jnp.sum(self._inverse_root() ** 2, 0)

    def _inverse_root(self) -> jax.Array:
        return jax.scipy.linalg.solve_triangular(self.L, jnp.eye(len(self.L), dtype=self.L.dtype), lower=True)

    def forms(self, V: jax.Array) -> jax.Array:
        m, d, k = V.shape
        W = jax.scipy.linalg.solve_triangular(self.L, jnp.moveaxis(V, 1, 0).reshape(d, m * k), lower=True)
        W = W.reshape(d, m, k)
        return jnp.einsum("dmk,dml->mkl", W, W)


def factorise(F: Any, n: jax.Array, prior: jax.Array, names: Any) -> Precision:
    """n F + prior, with a Cholesky factor where F is a matrix."""
    if not isinstance(F, DenseFisher):
        return Precision(F, n, prior)

    def total(F: DenseFisher, n: jax.Array, prior: jax.Array) -> jax.Array:
        return n * F.as_matrix() + prior * jnp.eye(F.d, dtype=F.dtype)

    M = run(total, F, n, prior)
    return DensePrecision(F, n, prior, cholesky(M, names, "n F + prior"))
