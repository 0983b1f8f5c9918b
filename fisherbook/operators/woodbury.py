"""D + A A^T for a diagonal D and a tall thin A: solves, determinant and draws through the small side."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Thin(NamedTuple):
    """D^{1/2} (I + P diag(t^2) P^T) D^{1/2} with orthonormal columns P [d, k] and t [k]."""

    root: jax.Array  # sqrt(D), scalar or [d]
    P: jax.Array
    t2: jax.Array
    d: int

    @staticmethod
    def of(A: jax.Array, damping: jax.Array) -> Thin:
        """From A [d, k] and damping, a scalar or [d], which the caller has seen to be positive."""
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

    def _within(self, V: jax.Array, values: jax.Array) -> jax.Array:
        """What P diag(values) P^T + (I - P P^T) makes of V.

        Projected twice, as I - P diag(t^2 / (1 + t^2)) P^T would lose what little is left where t is large.
        """
        rest = V - self.P @ (self.P.T @ V)
        rest = rest - self.P @ (self.P.T @ rest)
        return rest + self.P @ (values[:, None] * (self.P.T @ V))

    def solve(self, V: jax.Array) -> jax.Array:
        return self._divide(self._within(self._divide(V), 1 / (1 + self.t2)))

    def inverse_diagonal(self) -> jax.Array:
        inside = jnp.sum(self.P**2, 1)
        outside = 1 - inside
        # all but k of these are far from 1, and of those few what is left is found by projecting their unit vectors
        few = jax.lax.top_k(inside, min(self.d, self.P.shape[1] + 1))[1]
        unit = jnp.zeros((self.d, len(few)), inside.dtype).at[few, jnp.arange(len(few))].set(1)
        left = jnp.sum(self._within(unit, jnp.zeros_like(self.t2)) ** 2, 0)
        outside = jnp.maximum(outside.at[few].set(left), 0)
        return (outside + self.P**2 @ (1 / (1 + self.t2))) / self.root**2

    def logdet(self) -> jax.Array:
        return jnp.sum(jnp.log1p(self.t2)) + 2 * self.d / self.root.size * jnp.sum(jnp.log(self.root))

    def inverse_root(self, white: jax.Array) -> jax.Array:
        """A root of the inverse times white noise."""
        return self._divide(self._within(white, 1 / jnp.sqrt(1 + self.t2)))
