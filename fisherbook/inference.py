"""What an information matrix says about estimates: standard errors, bounds, nuisance parameters."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .law import Data, Exact, Law
from .model import Model, check_observations, flatten, is_traced, parameter_names, require
from .score import score, weighted_hessian, weighted_score_covariance

KINDS = ("expected", "observed", "opg", "sandwich")


@dataclass(frozen=True)
class Information:
    """Expected, observed and outer-product information at an estimate, per observation, side by side.

    Shown in a notebook it is a table of estimates and of the four standard errors, by parameter name.
    """

    expected: jax.Array
    observed: jax.Array
    opg: jax.Array
    meat: jax.Array
    gradient: jax.Array
    n: Any
    theta: Any

    def covariance(self, kind: str = "expected") -> jax.Array:
        """Covariance [d, d] of the estimate: the inverse information over n, or the sandwich H^-1 V H^-1 / n.

        Raises:
            ValueError: `kind` is none of the four, or the information is singular or indefinite; a null
                direction is named.
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        bread = self.observed if kind == "sandwich" else getattr(self, kind)
        name = "observed" if kind == "sandwich" else kind
        inverse = _inverse(bread, parameter_names(self.theta), f"the {name} information")
        inner = inverse @ self.meat @ inverse if kind == "sandwich" else inverse
        return inner / self.n

    def standard_errors(self, kind: str = "expected") -> Any:
        """Square roots of the diagonal of `covariance(kind)`, as a pytree like theta."""
        _, unravel = flatten(self.theta)
        return unravel(jnp.sqrt(jnp.diagonal(self.covariance(kind))))

    def _table(self) -> tuple[list[list[str]], str]:
        flat, _ = flatten(self.theta)
        columns = []
        for kind in KINDS:
            try:
                columns.append([f"{v:.4g}" for v in np.sqrt(np.diagonal(np.asarray(self.covariance(kind))))])
            except ValueError:
                columns.append(["none"] * flat.size)
        rows = [["parameter", "estimate", *KINDS]]
        for name, value, *errors in zip(parameter_names(self.theta), np.asarray(flat), *columns, strict=True):
            rows.append([name, f"{value:.4g}", *errors])
        note = f"Standard errors from n = {float(self.n):g} observations."
        try:
            covariance = np.asarray(self.covariance("observed"))
            step = self.n * covariance @ np.asarray(self.gradient)
            off = float(np.max(np.abs(step) / np.sqrt(np.diagonal(covariance))))
            note += f" A Newton step from here moves at most {off:.1g} standard errors." if off > 0.005 else ""
        except ValueError:
            note += " Not a maximum of the likelihood: the observed information is not positive definite."
        return rows, note

    def __repr__(self) -> str:
        if is_traced(self.expected, self.theta):
            return "Information(traced)"
        rows, note = self._table()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]
        return "\n".join([*lines, note])

    def _repr_html_(self) -> str:
        rows, note = self._table()
        head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in rows[0])
        body = "".join(
            f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(c)}</td>" for c in row[1:]) + "</tr>"
            for row in rows[1:]
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{escape(note)}</p>"


jax.tree_util.register_dataclass(
    Information, ["expected", "observed", "opg", "meat", "gradient", "n", "theta"], []
)


def information(
    model: Model,
    theta: Any,
    y: Any,
    x: Any = None,
    *,
    weights: Any = None,
    clusters: Any = None,
    law: Law = Exact(),  # noqa: B008
) -> Information:
    r"""Compare the expected, observed and outer-product information of one fit, and the sandwich.

    Per observation: expected :math:`F = E_\theta[s s^\top]`, observed :math:`-\frac1n\sum \nabla^2 \log p(y_i)`,
    outer product of gradients :math:`\frac1n\sum s_i s_i^\top`. The sandwich is HC0,
    :math:`H^{-1} V H^{-1} / n` with H the observed information and V the outer products of the scores, summed
    within clusters first where `clusters` is given (CR0); no small-sample factor.

    Args:
        model: `model(theta)` or `model(theta, x)`, a distribution.
        theta: parameter pytree with d scalars, usually the maximum-likelihood estimate; units u.
        y: observations with leading axis n.
        x: inputs with leading axis n, for a conditional model.
        weights: [n], non-negative: row i counts as `weights[i]` observations (frequency weights), so n is their
            sum. For sampling weights, whose sandwich squares them, pass also `clusters=range(n)`.
        clusters: [n] labels of groups whose rows may depend on each other.
        law: whose expectation the expected information is, `Exact()` or `MonteCarlo(key, draws)`.

    Returns:
        `Information` with `.expected .observed .opg` [d, d] in 1/u^2, `.n`, `.covariance(kind)` and
        `.standard_errors(kind)` for kind "expected", "observed", "opg" or "sandwich".

    Raises:
        ValueError: lengths differ, weights are negative, `y` is outside the support, fewer than two clusters.

    Example:
        >>> import numpyro.distributions as dist
        >>> y = jnp.array([0, 3, 1, 2])
        >>> found = information(lambda t: dist.Poisson(t["rate"]), {"rate": 1.5}, y)
        >>> print(found.expected.round(4), found.opg.round(4))  # 1 / rate; var(y) / rate^2
        [[0.6667]] [[0.5556]]

    Derived in the chapter "Fisher is not the Hessian". Source: White (1982); Efron and Hinkley (1978).
    """
    y = check_observations(model, theta, y, x)
    n = len(y)
    w = _row_weights(weights, n)
    total = jnp.sum(w)
    mean_weight = w * n / total
    row_model, rows = (model, x) if x is not None else (_repeat(model, n), np.zeros(n))
    opg_scores = score(model, theta, y, x)
    if isinstance(law, Data):
        raise ValueError("law=Data(y) is the outer product of gradients, .opg: pass Exact() or MonteCarlo(key, draws)")
    expected = weighted_score_covariance(model, theta, x, law, None if x is None else mean_weight)
    observed = -weighted_hessian(row_model, theta, rows, Data(y), mean_weight)
    opg = (w[:, None] * opg_scores).T @ opg_scores / total
    meat = opg if clusters is None else _clustered(w[:, None] * opg_scores, clusters, n) / total
    gradient = w @ opg_scores / total
    return Information(expected, observed, opg, meat, gradient, total if weights is not None else n, theta)


def _row_weights(weights: Any, n: int) -> jax.Array:
    if weights is None:
        return jnp.ones(n)
    w = jnp.asarray(weights, float)
    if w.shape != (n,):
        raise ValueError(f"weights has shape {w.shape} but y has {n} rows")
    return require(
        jnp.all((w >= 0) & jnp.isfinite(w)) & (jnp.sum(w) > 0), w, "weights must be finite and non-negative, not all 0"
    )


def _repeat(model: Model, n: int) -> Model:
    """An unconditional model as a conditional one whose rows are alike."""
    return lambda theta, rows: model(theta).expand((jnp.shape(rows)[0],))


def _clustered(scores: jax.Array, clusters: Any, n: int) -> jax.Array:
    """Sum over clusters of the outer product of the cluster's summed score."""
    labels = np.asarray(clusters)
    if labels.shape != (n,):
        raise ValueError(f"clusters has shape {labels.shape} but y has {n} rows")
    unique, index = np.unique(labels, return_inverse=True)
    if len(unique) < 2:
        raise ValueError("clusters has a single label: a sandwich needs at least two independent clusters")
    sums = jax.ops.segment_sum(scores, index, len(unique))
    return sums.T @ sums


def _matrix(F: Any, name: str = "F") -> jax.Array:
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


def _direction(vector: np.ndarray, names: Sequence[str]) -> str:
    vector = vector / np.linalg.norm(vector)
    terms = [f"{v:+.3g} {name}" for v, name in zip(vector, names, strict=True) if abs(v) > 1e-6]
    return " ".join(terms[:6]) + (" ..." if len(terms) > 6 else "")


def _inverse(F: jax.Array, names: Sequence[str], what: str) -> jax.Array:
    F = _matrix(F, what)
    values, vectors, scale = _spectrum(F)
    root = vectors * scale[:, None]

    def message() -> str:
        if is_traced(values):
            return f"{what} is singular or indefinite"
        direction = _direction(np.asarray(root[:, 0]), names)
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
    F = _matrix(F)
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
        name = _direction(np.asarray(scale * vectors[:, worst]), [f"theta[{i}]" for i in range(d)])
        warnings.warn(
            f"F is singular along {name}: no unbiased estimator of "
            f"{'theta' if jacobian is None else 'g'}[{rows[0]}] has finite variance, so its bound is infinite",
            stacklevel=2,
        )
    return jnp.where(lost[:, None] | lost[None, :], jnp.inf, bound)


def _positions(keep: Any, d: int) -> tuple[np.ndarray, np.ndarray]:
    index = np.arange(d)
    try:
        kept = np.atleast_1d(index[keep if isinstance(keep, slice) else np.asarray(keep)])
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
    F = _matrix(F)
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
    F = _matrix(F)
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
    F = _matrix(F)
    J = jnp.asarray(jacobian, F.dtype)
    J = J.reshape(1, 1) if J.ndim == 0 else J
    if J.ndim != 2 or J.shape[0] != F.shape[0]:
        raise ValueError(f"jacobian has shape {J.shape} but F is {F.shape}: it must be [{F.shape[0]}, k]")
    J = require(jnp.all(jnp.isfinite(J)), J, "jacobian has entries that are not finite")
    return J.T @ F @ J
