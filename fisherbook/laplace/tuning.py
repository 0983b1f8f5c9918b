"""The precision of the prior, chosen by the evidence or by data held out."""

from __future__ import annotations

from html import escape
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.flatten_util import ravel_pytree

from ..model import is_traced
from .fit import AWAY
from .posterior import LaplacePosterior

BOUNDS, STEPS = (1e-6, 1e6), 25


class TunedPrior(NamedTuple):
    """A posterior under the prior that was chosen, and how it was.

    Attributes:
        posterior: under the chosen prior; its mean is that of the one before.
        prior_precision: a number, or one for each leaf.
        objective: the evidence at the mode that the quadratic has under that prior, or the mean held-out
            log-likelihood.
        start: the same at the prior before.
        tried: (prior precision, objective) of every trial, a number or one for each leaf.
        by: "evidence" or "held-out".
        converged: whether the optimum lies inside the bounds and the optimiser says that it was reached.
    """

    posterior: LaplacePosterior
    prior_precision: Any
    objective: float
    start: float
    tried: list[tuple[Any, float]]
    by: str
    converged: bool

    def __repr__(self) -> str:
        shown = jax.tree.map(lambda p: float(f"{float(p):.4g}"), self.prior_precision)
        words = f"prior precision {shown} by {self.by}: {self.start:.6g} before, {self.objective:.6g} now"
        away = float(self.posterior.away)
        if away > AWAY:
            words += f"; the mode under this prior is {away:.2g} standard deviations away: fit again, and tune again"
        return words if self.converged else f"{words}; NOT converged, or at the edge of the range that was searched"

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self))}</p>"


def tune_prior(
    posterior: LaplacePosterior,
    *,
    y: Any = None,
    x: Any = None,
    per_leaf: bool = False,
    method: str | None = None,
    bounds: tuple[float, float] = BOUNDS,
) -> TunedPrior:
    r"""Choose the precision of the prior by the evidence, or by the log-likelihood of data held out.

    The curvature stays as it is, so that no data are read again. With `y` the mean log-density of those observations
    under `predictive` is maximised over a grid and refined. Without, the evidence is, by its gradient: that of
    `log_marginal_likelihood` and what the log joint gains on the way to the quadratic's mode under the new prior, which
    is exact for a linear model with normal noise. The mean itself stays; the report says how far the mode has moved.

    Args:
        posterior: where to begin.
        y: observations held out, and x their inputs; without them the evidence decides.
        per_leaf: one precision for each leaf of theta instead of one for all; by evidence only.
        method: of the predictive, for data held out.
        bounds: the range of precisions that is searched, in 1/u^2.

    Returns:
        A `TunedPrior`: the posterior under the chosen prior, the precision, and a report.

    Raises:
        ValueError: the bounds are not positive and ordered; `per_leaf` with data held out.

    Example:
        >>> import numpyro.distributions as dist
        >>> from fisherbook.laplace import laplace
        >>> y = jnp.array([1.0, 2.0, 3.0])  # N(t, 1): mean 2, and y has the covariance 1 + 1 / precision
        >>> flat = laplace(lambda t: dist.Normal(t, 1.0), jnp.array(2.0), y, prior_precision=1e-9)
        >>> print(round(tune_prior(flat).prior_precision, 4))  # 1 / (2^2 - 1/3)
        0.2727

    Derived in the chapter "Evidence". Source: MacKay (1992).
    """
    if is_traced(posterior):
        raise ValueError("tune_prior cannot stand inside jax.jit: differentiate log_marginal_likelihood there")
    low, high = bounds
    if not 0 < low < high < np.inf:
        raise ValueError(f"bounds must be positive and ordered, got {bounds}")
    if y is not None and per_leaf:
        raise ValueError("per_leaf=True chooses by the evidence only: leave out y, or per_leaf")
    tree = jax.tree.structure(posterior.mean)
    tried: list[tuple[Any, float]] = []
    range_ = (float(np.log(low)), float(np.log(high)))

    def unpack(logs: jax.Array) -> Any:
        return jax.tree.unflatten(tree, list(jnp.exp(logs))) if per_leaf else jnp.exp(logs[0])

    def note(logs: np.ndarray, value: float) -> None:
        tried.append((jax.tree.map(float, unpack(jnp.asarray(logs))), value))

    def evidence(posterior: LaplacePosterior, logs: jax.Array) -> jax.Array:
        other = posterior.with_prior(unpack(logs))
        return other.log_marginal_likelihood() + other.gain()

    def held_out(logs: np.ndarray) -> float:
        law = posterior.with_prior(unpack(jnp.asarray(logs))).predictive(x, method=method)
        return float(jnp.mean(law.log_prob(jnp.asarray(y))))

    begin = _inside(posterior, per_leaf, low, high)
    if per_leaf:  # a structure that cannot carry it says so here, in words, and not from inside of a program
        posterior.with_prior(unpack(jnp.asarray(begin + np.arange(len(begin)) / 100)))
    if y is None:
        typed = lambda logs: jnp.asarray(logs, posterior.flat.dtype)
        with_gradient = jax.jit(jax.value_and_grad(evidence, 1))  # one program, without the posterior's numbers in it
        score = lambda logs: float(with_gradient(posterior, typed(logs))[0])

        def loss(logs: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = with_gradient(posterior, typed(logs))
            note(logs, float(value))
            return -float(value), -np.asarray(gradient, float)

        found = scipy.optimize.minimize(
            loss,
            begin,
            jac=True,
            method="L-BFGS-B",
            bounds=[range_] * len(begin),
            options={"gtol": 1e-8, "ftol": 1e-14},
        )
        best, converged = found.x, bool(found.success)
    else:
        score = held_out

        def loss_of(log: float) -> float:
            value = held_out(np.array([log]))
            note(np.array([log]), value)
            return -value

        grid = np.linspace(*range_, STEPS)
        values = [loss_of(log) for log in grid]
        k = int(np.argmin(values))
        between = (grid[max(k - 1, 0)], grid[min(k + 1, STEPS - 1)])
        found = scipy.optimize.minimize_scalar(loss_of, bounds=between, method="bounded", options={"xatol": 1e-3})
        best, converged = np.log([max(tried, key=lambda trial: trial[1])[0]]), bool(found.success)
    converged = converged and bool(np.all((best > range_[0] + 1e-3) & (best < range_[1] - 1e-3)))
    precision = jax.tree.map(float, unpack(jnp.asarray(best)))
    chosen = posterior.with_prior(precision)
    by = "evidence" if y is None else "held-out"
    return TunedPrior(chosen, precision, score(best), score(begin), tried, by, converged)


def _inside(posterior: LaplacePosterior, per_leaf: bool, low: float, high: float) -> np.ndarray:
    """Logarithms of the prior before, within the bounds."""
    prior = np.broadcast_to(np.asarray(posterior.precision.prior, float), (posterior.d,))
    if not per_leaf:
        return np.log([np.clip(np.exp(np.mean(np.log(np.maximum(prior, low)))), low, high)])
    tree = ravel_pytree(posterior.mean)[1](jnp.asarray(prior))
    return np.log([np.clip(np.mean(np.asarray(leaf)), low, high) for leaf in jax.tree.leaves(tree)])
