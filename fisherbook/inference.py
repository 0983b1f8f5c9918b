"""The information in a fit, and its standard errors: expected, observed, outer product, sandwich."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .bounds import inverse
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
        bread_inverse = inverse(bread, parameter_names(self.theta), f"the {name} information")
        inner = bread_inverse @ self.meat @ bread_inverse if kind == "sandwich" else bread_inverse
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
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
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


jax.tree_util.register_dataclass(Information, ["expected", "observed", "opg", "meat", "gradient", "n", "theta"], [])


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
