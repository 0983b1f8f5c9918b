"""Cholesky first; where it fails, an eigendecomposition that names the null direction and an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ..bounds import name_direction
from ..model import is_traced, require


def cholesky(M: jax.Array, names: Callable[[], Sequence[str]], what: str = "F + damping") -> jax.Array:
    """Lower factor L of M = L L^T, or an error that names the direction about which M says nothing.

    Singular is decided in units of M's own diagonal, so that it does not depend on the units of theta.
    """
    diagonal = jnp.diagonal(M)
    scale = jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1))
    L = jnp.linalg.cholesky(M / scale[:, None] / scale)
    pivots = jnp.diagonal(L)
    ok = jnp.all(jnp.isfinite(pivots)) & (jnp.min(pivots) ** 2 > 8 * M.shape[0] * jnp.finfo(M.dtype).eps)

    def message() -> str:
        start = f"{what} is singular to working precision"
        end = "pass damping > 0, fix a parameter, or take fewer"
        if is_traced(M):
            return f"{start}: {end}"
        if not bool(jnp.all(jnp.isfinite(M))):
            return f"{what} has entries that are not finite"
        values, vectors = np.linalg.eigh(np.asarray(M / scale[:, None] / scale))
        null = np.asarray(vectors[:, 0] / scale)
        where = f"smallest eigenvalue {values[0]:.1e} (unit diagonal), along {name_direction(null, names())}"
        return f"{start}: {where}; {end}"

    return scale[:, None] * require(ok, L, message)
