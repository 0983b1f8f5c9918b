"""The precision n F + prior of a posterior, factorised once: products, solves, determinant, draws, variances."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from ..compilation import run
from ..model import is_traced, parameter_names, require
from ..operators import tiles
from ..operators.base import Fisher, Vector
from ..operators.dense import DenseFisher
from ..operators.factor import cholesky

FLOAT64 = "jax.config.update('jax_enable_x64', True)"
WHOLE = 512  # rows of a triangle that are not divided further
TOLERANCE = 0.01  # of relative error that rounding may leave in a variance


class Precision(eqx.Module):
    """n F + D for an operator F and a diagonal D, a number or [d]; whatever has the operators' methods may be F.

    `precision @ v` and `precision.solve(v)` take a pytree like theta, [d] or [d, k], and answer in the same form.
    """

    F: Any
    theta: Any
    n: jax.Array
    prior: jax.Array

    @property
    def d(self) -> int:
        return int(ravel_pytree(self.theta)[0].size)

    @property
    def shape(self) -> tuple[int, int]:
        return self.d, self.d

    @property
    def dtype(self) -> Any:
        return ravel_pytree(self.theta)[0].dtype

    @property
    def damping(self) -> Any:
        """What the operator adds to F: a number, or one array for each leaf of theta."""
        share = self.prior / self.n
        return share if share.ndim == 0 else ravel_pytree(self.theta)[1](share)

    def __matmul__(self, v: Any) -> Any:
        vector = Vector(v, self.theta)
        return vector.back(self.multiply(vector.matrix))

    def solve(self, v: Any) -> Any:
        """The covariance times v."""
        vector = Vector(v, self.theta)
        return vector.back(self._solve(vector.matrix))

    def as_matrix(self) -> jax.Array:
        """The matrix [d, d] in 1/u^2."""
        return self.multiply(jnp.eye(self.d, dtype=self.dtype))

    def diagonal(self) -> jax.Array:
        """The diagonal [d] in 1/u^2."""
        return self.n * self.F.diagonal() + self.prior

    def multiply(self, V: jax.Array) -> jax.Array:
        return self.n * (self.F @ V) + (self.prior if self.prior.ndim == 0 else self.prior[:, None]) * V

    def _solve(self, V: jax.Array) -> jax.Array:
        return in_words(self.dtype, lambda: self.F.solve(V, self.damping) / self.n)

    def logdet(self) -> jax.Array:
        """log det of the precision, a scalar."""
        return in_words(self.dtype, lambda: self.F.logdet(self.damping) + self.d * jnp.log(self.n))

    def draws(self, key: jax.Array, count: int) -> jax.Array:
        """[count, d] from N(0, covariance)."""
        return in_words(self.dtype, lambda: self.F.sample(key, (count,), self.damping) / jnp.sqrt(self.n))

    def variances(self) -> jax.Array:
        """The diagonal [d] of the covariance."""
        if isinstance(self.F, Fisher):
            return in_words(self.dtype, lambda: self.F.inverse_diagonal(self.damping) / self.n)
        return jnp.diagonal(self._solve(jnp.eye(self.d, dtype=self.dtype)))

    def covariance(self) -> jax.Array:
        """The inverse [d, d], symmetric."""
        S = self._solve(jnp.eye(self.d, dtype=self.dtype))
        return (S + S.T) / 2

    def forms(self, V: jax.Array) -> jax.Array:
        """V^T covariance V [m, k, k] for V [m, d, k]."""
        m, d, k = V.shape
        SV = self._solve(jnp.moveaxis(V, 1, 0).reshape(d, m * k)).reshape(d, m, k)
        return jnp.einsum("mdk,dml->mkl", V, SV)


class DensePrecision(Precision):
    """The same with the Cholesky factor of n F + D at hand."""

    L: jax.Array

    def _solve(self, V: jax.Array) -> jax.Array:
        return _cho_solve(self.L, V)

    def logdet(self) -> jax.Array:
        return _log_square(self.L)

    def draws(self, key: jax.Array, count: int) -> jax.Array:
        return _draw(count, self.L, key)

    def variances(self) -> jax.Array:
        return _norms(self.L)

    def covariance(self) -> jax.Array:
        return _inverse_squared(self.L)

    def forms(self, V: jax.Array) -> jax.Array:
        m, d, k = V.shape
        W = jax.scipy.linalg.solve_triangular(self.L, jnp.moveaxis(V, 1, 0).reshape(d, m * k), lower=True)
        W = W.reshape(d, m, k)
        return jnp.einsum("dmk,dml->mkl", W, W)


# compiled once for all factors of these shapes, as no model is called in them


@jax.jit
def _cho_solve(L: jax.Array, V: jax.Array) -> jax.Array:
    return jax.scipy.linalg.cho_solve((L, True), V)


@jax.jit
def _log_square(L: jax.Array) -> jax.Array:
    """log det L L^T."""
    return 2 * jnp.sum(jnp.log(jnp.diagonal(L)))


@partial(jax.jit, static_argnums=0)
def _draw(count: int, L: jax.Array, key: jax.Array) -> jax.Array:
    white = jax.random.normal(key, (len(L), count), L.dtype)
    return jax.scipy.linalg.solve_triangular(L, white, lower=True, trans=1).T


@jax.jit
def _norms(L: jax.Array) -> jax.Array:
    """The diagonal of (L L^T)^-1."""
    return jnp.sum(_inverse(L) ** 2, 0)


@jax.jit
def _inverse_squared(L: jax.Array) -> jax.Array:
    """(L L^T)^-1."""
    return _squared(_inverse(L))


def _inverse(L: jax.Array) -> jax.Array:
    """The inverse of a lower triangle, by halves: a third of the work of solving for every unit vector."""
    d = len(L)
    if d <= WHOLE:
        return jax.scipy.linalg.solve_triangular(L, jnp.eye(d, dtype=L.dtype), lower=True)
    h = d // 2
    A, C = _inverse(L[:h, :h]), _inverse(L[h:, h:])
    B = -(C @ L[h:, :h]) @ A
    return jnp.block([[A, jnp.zeros((h, d - h), L.dtype)], [B, C]])


def _squared(T: jax.Array) -> jax.Array:
    """T^T T for a lower triangle T: tiles on and above the diagonal, from the rows that are not zero in them."""
    parts = tiles.cut(len(T), -(-len(T) // WHOLE))
    return tiles.assemble(tiles.upper(parts, lambda i, j: T[j.start :, i].T @ T[j.start :, j]), len(parts))


def factorise(F: Any, theta: Any, n: jax.Array, prior: jax.Array) -> Precision:
    """n F + prior, with a Cholesky factor where F is a matrix."""
    if not isinstance(F, DenseFisher):
        return Precision(F, theta, n, prior)

    def total(F: DenseFisher, n: jax.Array, prior: jax.Array) -> jax.Array:
        return n * F.as_matrix() + prior * jnp.eye(F.d, dtype=F.dtype)

    M = run(total, F, n, prior)
    advice = "pass a larger prior_precision, or fix a parameter"
    if M.dtype == jnp.float32:
        advice += f", or compute in float64 ({FLOAT64})"
    L = cholesky(M, lambda: parameter_names(theta), "n F + prior", advice)
    return DensePrecision(F, theta, n, prior, _accurate(M, L))


@jax.jit
def _rounding(M: jax.Array, L: jax.Array) -> jax.Array:
    """The relative error that rounding leaves in a variance."""
    scale = 1 / jnp.sqrt(jnp.diagonal(M))  # the units of theta change no digit
    v = jnp.cos(jnp.arange(len(M), dtype=M.dtype) ** 2)  # no direction that a matrix prefers
    for _ in range(6):  # power iterations for the largest eigenvalue of the inverse of unit diagonal
        v = v / jnp.linalg.norm(v)
        v = jax.scipy.linalg.cho_solve((L, True), v / scale) / scale
    return jnp.linalg.norm(v) * jnp.finfo(M.dtype).eps


def _accurate(M: jax.Array, L: jax.Array) -> jax.Array:
    """L, or an error where rounding would leave no digit of the variances, which is what float32 does soonest."""

    error = _rounding(M, L)

    def message() -> str:
        start = "n F + prior is too ill-conditioned"
        end = f"compute in float64 ({FLOAT64}), or pass a larger prior_precision"
        if is_traced(error):
            return f"{start} for {M.dtype}: {end}"
        return f"{start} for {M.dtype}: rounding alone changes variances by {float(error):.0%}; {end}"

    limit = TOLERANCE if M.dtype == jnp.float32 else jnp.inf  # in float64 the factor itself fails before
    return require(error < limit, L, message)


def in_words(dtype: Any, call: Callable[[], Any]) -> Any:
    """The answer of an operator whose errors speak of damping, which here is the prior."""
    try:
        return call()
    except ValueError as error:
        text = str(error)
        if "singular" in text and dtype == jnp.float32:
            text += f", or compute in float64 ({FLOAT64})"
        for old, new in (
            ("F + damping", "n F + prior"),
            ("pass damping > 0", "pass a prior_precision > 0"),
            ("damping must", "prior_precision must"),
        ):
            text = text.replace(old, new)
        raise ValueError(text) from error
