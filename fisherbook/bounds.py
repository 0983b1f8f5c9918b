"""Bounds and blocks of an information matrix: Cramer-Rao, nuisance parameters, change of coordinates.

Ranks are decided in units of the diagonal of F, so that they do not depend on the units of theta.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .model import is_traced, require


def as_information(F: Any, name: str = "F") -> jax.Array:
    F = jnp.asarray(F)
    F = F.reshape(1, 1) if F.ndim == 0 else F
    if F.ndim != 2 or F.shape[0] != F.shape[1] or F.shape[0] == 0:
        raise ValueError(f"{name} must be a square matrix [d, d], but has shape {F.shape}")
    if not jnp.issubdtype(F.dtype, jnp.floating):
        F = F.astype(float)
    slack = 1e4 * jnp.finfo(F.dtype).eps
    size = jnp.sqrt(jnp.abs(jnp.diagonal(F)))
    F = require(jnp.all(jnp.isfinite(F)), F, f"{name} has entries that are not finite")
    symmetric = jnp.all(jnp.abs(F - F.T) <= slack * size[:, None] * size + jnp.finfo(F.dtype).tiny)
    return require(symmetric, F, f"{name} is not symmetric, so it is not an information matrix")


def _spectrum(F: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Eigenvalues and vectors of F in units of its own diagonal, with the scales [d]: rank does not depend on units."""
    diagonal = jnp.diagonal(F)
    scale = jnp.where(diagonal > 0, 1 / jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1)), 1)
    values, vectors = jnp.linalg.eigh(scale[:, None] * F * scale)
    return values, vectors, scale


def _threshold(F: jax.Array) -> float:
    return 32 * F.shape[0] * float(jnp.finfo(F.dtype).eps)


def name_direction(vector: np.ndarray, names: Sequence[str]) -> str:
    vector = vector / np.linalg.norm(vector)
    terms = [f"{v:+.3g} {name}" for v, name in zip(vector, names, strict=True) if abs(v) > 1e-6]
    return " ".join(terms[:6]) + (" ..." if len(terms) > 6 else "")


def inverse(F: jax.Array, names: Sequence[str], what: str) -> jax.Array:
    F = as_information(F, what)
    values, vectors, scale = _spectrum(F)
    root = vectors * scale[:, None]

    def message() -> str:
        if is_traced(values):
            return f"{what} is singular or indefinite"
        direction = name_direction(np.asarray(root[:, 0]), names)
        if float(values[0]) < -_threshold(F):
            return f"{what} is not positive definite: theta is not a maximum along {direction}"
        return f"{what} is singular: the data say nothing about the direction {direction}, so it has no standard error"

    values = require(values[0] > _threshold(F), values, message)
    return (root / values) @ root.T


def cramer_rao(F: Any, n: Any = 1, jacobian: Any = None) -> jax.Array:
    r"""Bound the covariance of unbiased estimators from below: :math:`G (nF)^{-1} G^\top`.

    Args:
        F: information per observation [d, d] in 1/u^2, possibly singular.
        n: number of independent observations.
        jacobian: G [k, d] (or [d]), the Jacobian of the function g(theta) that is estimated; the identity
            if omitted. For an estimator with bias b(theta) of theta itself, G = I + db/dtheta.

    Returns:
        Array [k, k]. Where F is singular, functions whose gradient lies in its range ("estimable") keep a finite
        bound; for the others the row and column are infinite, and a warning names the null direction.

    Raises:
        ValueError: shapes do not fit, `n` is not positive, F is not symmetric positive semi-definite.

    Example:
        >>> F = jnp.array([[0.25, -0.25], [-0.25, 0.25]])  # a softmax of two classes: shifts are invisible
        >>> print(cramer_rao(F, n=100, jacobian=jnp.array([1.0, -1.0])))
        [[0.04]]

    Derived in the chapter "The Cramer-Rao bound". Source: Rao (1945); Cramer (1946); Lehmann and Casella (1998),
    section 2.6.
    """
    F = as_information(F)
    d = F.shape[0]
    G = jnp.eye(d, dtype=F.dtype) if jacobian is None else jnp.atleast_2d(jnp.asarray(jacobian, F.dtype))
    if G.ndim != 2 or G.shape[1] != d:
        raise ValueError(f"jacobian has shape {jnp.shape(jacobian)} but F is [{d}, {d}]: it must be [k, {d}]")
    n = require(jnp.all(jnp.asarray(n) > 0), n, f"n must be positive, got {n}")
    values, vectors, scale = _spectrum(F)
    values = require(
        values[0] >= -_threshold(F), values, "F is not positive semi-definite, so it is not an information matrix"
    )
    null = values <= _threshold(F)
    A = (G * scale) @ vectors  # rows of G in the eigenbasis
    bound = (A * jnp.where(null, 0, 1 / jnp.where(null, 1, values))) @ A.T / n
    size = jnp.linalg.norm(A, axis=1)
    lost = jnp.linalg.norm(jnp.where(null, A, 0), axis=1) > jnp.sqrt(jnp.finfo(F.dtype).eps) * size
    if not is_traced(lost) and bool(lost.any()):
        rows = np.flatnonzero(np.asarray(lost))
        worst = np.argmax(np.abs(np.where(np.asarray(null), np.asarray(A[rows[0]]), 0)))
        name = name_direction(np.asarray(scale * vectors[:, worst]), [f"theta[{i}]" for i in range(d)])
        warnings.warn(
            f"F is singular along {name}: no unbiased estimator of "
            f"{'theta' if jacobian is None else 'g'}[{rows[0]}] has finite variance, so its bound is infinite",
            stacklevel=2,
        )
    return jnp.where(lost[:, None] | lost[None, :], jnp.inf, bound)


def _positions(keep: Any, d: int) -> tuple[np.ndarray, np.ndarray]:
    index = np.arange(d)
    try:
        chosen = index[keep] if isinstance(keep, slice) else np.asarray(keep)
        kept = np.atleast_1d(index[chosen] if chosen.size else index[:0])
    except IndexError as error:
        raise ValueError(f"keep = {keep!r} does not pick from {d} parameters: {error}") from None
    if len(kept) == 0 or len(set(kept.tolist())) < len(kept):
        raise ValueError(f"keep = {keep!r} must pick at least one parameter, each once")
    return kept, np.setdiff1d(index, kept)


def marginal_information(F: Any, keep: Any) -> jax.Array:
    r"""Eliminate nuisance parameters: the Schur complement :math:`F_{kk} - F_{kr} F_{rr}^{-1} F_{rk}`.

    It is the inverse of the kept block of :math:`F^{-1}`: what the data say of these parameters when the rest
    must be estimated too.

    Args:
        F: information [d, d] in 1/u^2; a singular nuisance block is eliminated by its generalised inverse.
        keep: positions of the parameters of interest: an integer, a list, a slice or a mask.

    Returns:
        Array [k, k], never larger than `conditional_information(F, keep)`.

    Raises:
        ValueError: F is not square and symmetric, or `keep` does not fit it.

    Example:
        >>> print(marginal_information(jnp.array([[2.0, 1.0], [1.0, 1.0]]), 0))
        [[1.]]

    Derived in the chapter "The Cramer-Rao bound". Source: Lehmann and Casella (1998), section 2.6.
    """
    F = as_information(F)
    kept, rest = _positions(keep, F.shape[0])
    block = F[np.ix_(kept, kept)]
    if len(rest) == 0:
        return block
    nuisance = F[np.ix_(rest, rest)]
    values, vectors, scale = _spectrum(nuisance)
    good = values > _threshold(nuisance)
    A = F[np.ix_(kept, rest)] @ (scale[:, None] * vectors)
    schur = block - (A * jnp.where(good, 1 / jnp.where(good, values, 1), 0)) @ A.T
    return (schur + schur.T) / 2


def conditional_information(F: Any, keep: Any) -> jax.Array:
    """Take the block of the parameters of interest: their information when all others are known.

    Args:
        F: information [d, d] in 1/u^2.
        keep: positions of the parameters of interest: an integer, a list, a slice or a mask.

    Returns:
        Array [k, k].

    Raises:
        ValueError: F is not square and symmetric, or `keep` does not fit it.

    Example:
        >>> print(conditional_information(jnp.array([[2.0, 1.0], [1.0, 1.0]]), 0))
        [[2.]]

    Derived in the chapter "The Cramer-Rao bound". Source: Lehmann and Casella (1998), section 2.6.
    """
    F = as_information(F)
    kept, _ = _positions(keep, F.shape[0])
    return F[np.ix_(kept, kept)]


def reparametrize(F: Any, jacobian: Any) -> jax.Array:
    r"""Express the information in other coordinates eta: :math:`J^\top F J` with :math:`J = d\theta / d\eta`.

    Args:
        F: information [d, d] about theta, in 1/u^2.
        jacobian: J [d, k] of theta with respect to the new coordinates (a number where d = k = 1).

    Returns:
        Array [k, k], the information about eta.

    Raises:
        ValueError: F is not square and symmetric, or `jacobian` does not fit it.

    Example:
        >>> p = 0.9
        >>> print(reparametrize(1 / (p * (1 - p)), p * (1 - p)).round(4))  # from p to the log-odds
        [[0.09]]

    Derived in the chapter "Information is the covariance of the score". Source: Lehmann and Casella (1998),
    section 2.6.
    """
    F = as_information(F)
    J = jnp.asarray(jacobian, F.dtype)
    J = J.reshape(1, 1) if J.ndim == 0 else J
    if J.ndim != 2 or J.shape[0] != F.shape[0]:
        raise ValueError(f"jacobian has shape {J.shape} but F is {F.shape}: it must be [{F.shape[0]}, k]")
    J = require(jnp.all(jnp.isfinite(J)), J, "jacobian has entries that are not finite")
    return J.T @ F @ J
