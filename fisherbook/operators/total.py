"""The sum of operators of different structures."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .base import Fisher
from .factor import cholesky

LARGEST = 8192  # parameters up to which a sum is solved through its matrix


class Sum(Fisher):
    """F1 + F2: products and diagonal term by term; solves through the matrix, for at most `LARGEST` parameters."""

    terms: tuple[Fisher, ...]

    def _multiply(self, V: jax.Array) -> jax.Array:
        return sum((t.scale * t._multiply(V) for t in self.terms), jnp.zeros((), V.dtype))

    def _diagonal(self) -> jax.Array:
        return sum((t.scale * t._diagonal() for t in self.terms), jnp.zeros((), self.dtype))

    def _factor(self, damping: jax.Array) -> jax.Array:
        if self.d > LARGEST:
            raise ValueError(
                f"a sum of operators of different structures has no exact solve for {self.d} parameters "
                f"(at most {LARGEST}): choose one structure for both, or solve as_lineax() with lineax.CG"
            )
        M = self._multiply(jnp.eye(self.d, dtype=self.dtype))
        return cholesky(M + damping * jnp.eye(self.d, dtype=M.dtype), lambda: self.names)

    def _solve(self, V: jax.Array, damping: jax.Array) -> jax.Array:
        return jax.scipy.linalg.cho_solve((self._factor(damping), True), V)

    def _logdet(self, damping: jax.Array) -> jax.Array:
        return 2 * jnp.sum(jnp.log(jnp.diagonal(self._factor(damping))))

    def _inverse_root(self, white: jax.Array, damping: jax.Array) -> jax.Array:
        return jax.scipy.linalg.solve_triangular(self._factor(damping), white, lower=True, trans=1)
