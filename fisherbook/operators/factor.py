"""Cholesky first; where it fails, an eigendecomposition that names the null direction and an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ..bounds import name_direction
from ..model import is_traced, require

SHOWN = 3  # null directions that an error names


def cholesky(
    M: jax.Array,
    names: Callable[[], Sequence[str]],
    what: str = "F + damping",
    advice: str = "pass damping > 0, fix a parameter, or take fewer",
) -> jax.Array:
    """Lower factor L of M = L L^T, or an error that names the directions about which M says nothing.

    Singular is decided in units of M's own diagonal, so that it does not depend on the units of theta.
    """
    L, scale, ok = _factor(M)

    def message() -> str:
        if is_traced(M):
            return f"{what} is singular to working precision, or indefinite: {advice}"
        if not bool(jnp.all(jnp.isfinite(M))):
            return f"{what} has entries that are not finite"
        values, vectors = np.linalg.eigh(np.asarray(M / scale[:, None] / scale))
        empty = max(1, int(np.sum(values < 8 * len(M) * jnp.finfo(M.dtype).eps)))
        found = "; ".join(name_direction(v / np.asarray(scale), names()) for v in vectors.T[: min(empty, SHOWN)])
        more = f" and {empty - SHOWN} more directions" if empty > SHOWN else ""
        where = f"smallest eigenvalue {values[0]:.1e} (unit diagonal), along {found}{more}"
        if values[0] < -8 * len(M) * jnp.finfo(M.dtype).eps:
            return f"{what} is indefinite: {where}; it is the curvature of no maximum"
        return f"{what} is singular to working precision: {where}; {advice}"

    return require(ok, L, message)


@jax.jit
def _factor(M: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The factor, the units of M's diagonal, and whether all pivots are well above rounding."""
    diagonal = jnp.diagonal(M)
    scale = jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1))
    L = jnp.linalg.cholesky(M / scale[:, None] / scale, symmetrize_input=False)  # symmetric, and large
    pivots = jnp.diagonal(L)
    ok = jnp.all(jnp.isfinite(pivots)) & (jnp.min(pivots) ** 2 > 8 * M.shape[0] * jnp.finfo(M.dtype).eps)
    return scale[:, None] * L, scale, ok
