"""D + A A^T for a diagonal D and a tall thin A: solves, determinant and draws through the small side."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..model import require


class Thin(NamedTuple):
    """D^{1/2} (I + P diag(t^2) P^T) D^{1/2} with orthonormal columns P [d, k] and t [k]."""

    root: jax.Array  # sqrt(D), scalar or [d]
    P: jax.Array
    t2: jax.Array
    d: int

    @staticmethod
    def of(A: jax.Array, damping: jax.Array, hint: str) -> Thin:
        """From A [d, k] and damping > 0, a scalar or [d]."""
        damping = require(jnp.all(damping > 0), damping, hint)
        root = jnp.sqrt(damping)
        scaled = A / jnp.reshape(root, (-1, 1))
        if A.shape[1] <= A.shape[0]:
            Q, upper = jnp.linalg.qr(scaled)
            left, t, _ = jnp.linalg.svd(upper, full_matrices=False)
            return Thin(root, Q @ left, t**2, A.shape[0])
        P, t, _ = jnp.linalg.svd(scaled, full_matrices=False)
        return Thin(root, P, t**2, A.shape[0])

    def _divide(self, V: jax.Array) -> jax.Array:
        return V / jnp.reshape(self.root, (-1, 1))

    def _spread(self, V: jax.Array, change: jax.Array) -> jax.Array:
        """(I + P diag(change) P^T) V."""
        return V + self.P @ (change[:, None] * (self.P.T @ V))

    def solve(self, V: jax.Array) -> jax.Array:
        return self._divide(self._spread(self._divide(V), -self.t2 / (1 + self.t2)))

    def inverse_diagonal(self) -> jax.Array:
        return (1 - self.P**2 @ (self.t2 / (1 + self.t2))) / self.root**2

    def logdet(self) -> jax.Array:
        return jnp.sum(jnp.log1p(self.t2)) + 2 * self.d / self.root.size * jnp.sum(jnp.log(self.root))

    def inverse_root(self, white: jax.Array) -> jax.Array:
        """A root of the inverse times white noise."""
        change = -self.t2 / (jnp.sqrt(1 + self.t2) * (1 + jnp.sqrt(1 + self.t2)))  # 1/sqrt(1 + t^2) - 1
        return self._divide(self._spread(white, change))
