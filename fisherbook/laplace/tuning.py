"""The precision of the prior, chosen by the evidence or by data held out."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.flatten_util import ravel_pytree

from ..compilation import checks_apart, compile_once, split_arrays
from ..model import is_traced
from .fit import AWAY
from .posterior import LaplacePosterior

BOUNDS, STEPS = (1e-6, 1e6), 25
CLOSE = 1e-3  # in the logarithm of the prior


class TunedPrior(NamedTuple):
    """A posterior under the prior that was chosen, and how it was.

    Attributes:
        posterior: under the chosen prior; its mean is that of the one before.
        prior_precision: a number, or one for each leaf.
        objective: the evidence at the mode that the quadratic has under that prior, or the mean held-out
            log-likelihood.
        start: the same at the prior before.
        tried: (prior precision, objective) of every trial, a number or one for each leaf; by data held out, minus
            infinity for a prior too weak for n F + prior to be factorised.
        by: "evidence" or "held-out".
        converged: whether the optimum lies inside the range that was searched and was reached: the evidence rises by
            less than 1e-4 nats (in float32 1e-3) for one unit of the precision's logarithm, or the optimiser says so.
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
    key: Any = None,
    bounds: tuple[float, float] = BOUNDS,
) -> TunedPrior:
    r"""Choose the precision of the prior by the evidence, or by the log-likelihood of data held out.

    The curvature stays as it is, so that no data are read again. With `y` the mean log-density of those observations
    under `predictive` is maximised over a grid and refined. Without, the evidence is, by its gradient: that of
    `log_marginal_likelihood` and what the log joint gains on the way to the quadratic's mode under the new prior, which
    is exact for a linear model with normal noise. The mean itself stays; the report says how far the mode has moved.
    Priors too weak for n F + prior to be factorised, of which float32 has more, end the range that is searched.

    Args:
        posterior: where to begin.
        y: observations held out, and x their inputs; without them the evidence decides.
        per_leaf: one precision for each leaf of theta instead of one for all; by evidence only.
        method: of the predictive, for data held out.
        key: for a method that draws, the same draws under every prior.
        bounds: the range of precisions that is searched, in 1/u^2.

    Returns:
        A `TunedPrior`: the posterior under the chosen prior, the precision, and a report.

    Raises:
        ValueError: the bounds are not positive and ordered; `per_leaf` with data held out; a method that draws, without
            a key.

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
    ends = (float(np.log(low)), float(np.log(high)))

    def unpack(logs: Any) -> Any:
        logs = jnp.asarray(logs, posterior.flat.dtype)
        return jax.tree.unflatten(tree, list(jnp.exp(logs))) if per_leaf else jnp.exp(logs[0])

    def note(logs: np.ndarray, value: float) -> float:
        tried.append((jax.tree.map(float, unpack(logs)), value))
        return value

    begin = _inside(posterior, per_leaf, low, high)
    if per_leaf:  # a structure that cannot carry it says so here, in words, and not from inside of a program
        posterior.with_prior(unpack(begin + np.arange(len(begin)) / 100))
    if y is None:
        evidence = _evidence(posterior, unpack, begin)
        score = lambda logs: evidence(logs)[0]
        eps = float(jnp.finfo(posterior.flat.dtype).eps)
        best, converged = _uphill(evidence, note, begin, ends, max(1e-8, 1e4 * eps))
    else:
        score = lambda logs: _held_out(posterior, unpack(logs), jnp.asarray(y), x, method, key)
        best, converged = _over_grid(score, note, ends)
    precision = jax.tree.map(float, unpack(best))
    chosen = posterior.with_prior(precision)
    by = "evidence" if y is None else "held-out"
    return TunedPrior(chosen, precision, score(best), score(begin), tried, by, converged)


class _Singular(ValueError):
    """n F + prior cannot be factorised in this precision under the prior with these logarithms."""

    def __init__(self, logs: np.ndarray):
        self.logs = logs
        prior = ", ".join(f"{p:.3g}" for p in np.exp(logs))
        super().__init__(
            f"the evidence cannot be computed under the prior precision {prior}: n F + prior is singular to working "
            "precision, or not finite; pass other bounds, or compute in float64"
        )


def _evidence(
    posterior: LaplacePosterior, unpack: Callable[[Any], Any], begin: np.ndarray
) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """The evidence at the quadratic's mode and its gradient, by one program for all posteriors of these shapes."""
    leaves, whole = split_arrays(posterior)
    typed = lambda logs: jnp.asarray(logs, posterior.flat.dtype)

    def evidence(logs: jax.Array, *leaves: Any) -> tuple[jax.Array, jax.Array]:
        with checks_apart() as checks:
            other = whole(leaves).with_prior(unpack(logs))
            value = other.log_marginal_likelihood() + other.gain()
        return value, jnp.all(jnp.stack([jnp.isfinite(value), *checks]))

    program = compile_once(jax.value_and_grad(evidence, has_aux=True), typed(begin), *leaves)

    def with_gradient(logs: np.ndarray) -> tuple[float, np.ndarray]:
        try:
            (value, fine), gradient = program(typed(logs), *leaves)
            fine = bool(fine)
        except jax.errors.JaxRuntimeError as error:  # lineax, in the derivative of a solve that did not converge
            raise _Singular(logs) from error
        if not fine:
            raise _Singular(logs)
        return float(value), np.asarray(gradient, float)

    return with_gradient


def _uphill(
    evidence: Callable[[np.ndarray], tuple[float, np.ndarray]],
    note: Callable[[np.ndarray, float], float],
    begin: np.ndarray,
    ends: tuple[float, float],
    slope: float,
) -> tuple[np.ndarray, bool]:
    """Where the evidence is largest, and whether that is no end of the range.

    There it rises by no more than `slope` nats for one unit of a logarithm. A prior too weak for n F + prior to be
    factorised ends the range: the search goes on above it.
    """
    low, best = np.full(len(begin), ends[0]), (begin, -np.inf)

    def loss(logs: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best
        value, gradient = evidence(logs)
        best = max(best, (logs.copy(), note(logs, value)), key=lambda trial: trial[1])
        return -value, -gradient

    while True:
        options = {"gtol": slope, "ftol": 1e-14}
        limits = scipy.optimize.Bounds(low, ends[1])
        try:
            found = scipy.optimize.minimize(loss, best[0], jac=True, method="L-BFGS-B", bounds=limits, options=options)
        except _Singular as weak:
            weaker = weak.logs < best[0] - CLOSE
            if not weaker.any():
                raise
            low = np.where(weaker, (weak.logs + best[0]) / 2, low)
            continue
        inside = (found.x > low + CLOSE) & (found.x < ends[1] - CLOSE)
        # rounding, or conjugate gradients, end a line search before the optimiser is content: a flat place will do
        return found.x, bool(np.all(inside)) and (found.success or bool(np.abs(found.jac).max() < max(slope, 1e-4)))


def _held_out(posterior: LaplacePosterior, prior: Any, y: jax.Array, x: Any, method: str | None, key: Any) -> float:
    """The mean held-out log-likelihood; minus infinity for a prior too weak for n F + prior to be factorised."""
    try:
        other = posterior.with_prior(prior)
    except ValueError:
        return -np.inf
    return float(jnp.mean(other.predictive(x, method=method, key=key).log_prob(y)))


def _over_grid(
    score: Callable[[np.ndarray], float], note: Callable[[np.ndarray, float], float], ends: tuple[float, float]
) -> tuple[np.ndarray, bool]:
    """The best of a grid, refined between its neighbours, and whether that is no end of the range."""
    loss = lambda log: -note(np.array([log]), score(np.array([log])))
    grid = np.linspace(*ends, STEPS)
    values = [loss(log) for log in grid]
    possible = np.flatnonzero(np.isfinite(values))
    if not len(possible):
        raise ValueError(
            "no prior within the bounds has a finite held-out log-likelihood: pass other bounds, or float64"
        )
    k, first, last = int(np.argmin(values)), possible[0], possible[-1]
    between = (grid[max(k - 1, first)], grid[min(k + 1, last)])
    found = scipy.optimize.minimize_scalar(loss, bounds=between, method="bounded", options={"xatol": CLOSE})
    best = found.x if found.fun < values[k] else grid[k]
    inside = grid[first] + CLOSE < best < grid[last] - CLOSE
    return np.array([best]), bool(found.success and inside)


def _inside(posterior: LaplacePosterior, per_leaf: bool, low: float, high: float) -> np.ndarray:
    """Logarithms of the prior before, within the bounds."""
    prior = np.broadcast_to(np.asarray(posterior.precision.prior, float), (posterior.d,))
    if not per_leaf:
        return np.log([np.clip(np.exp(np.mean(np.log(np.maximum(prior, low)))), low, high)])
    tree = ravel_pytree(posterior.mean)[1](jnp.asarray(prior))
    return np.log([np.clip(np.mean(np.asarray(leaf)), low, high) for leaf in jax.tree.leaves(tree)])
