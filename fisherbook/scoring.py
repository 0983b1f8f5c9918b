"""Maximum likelihood by Fisher scoring: natural-gradient steps with a line search and a report."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .bounds import name_direction
from .inference import Information, information
from .law import Data, Exact, Law, check_law
from .likelihood import Likelihood, Value
from .model import Model, check_observations, flatten, is_traced, not_finite, parameter_names, row_count

ARMIJO = 1e-4  # the part of the promised increase that a step must deliver
HALVINGS = 40
FADING = 0.75  # information left along a step too short to matter: 1 near a maximum, 1/e on the way to infinity


class Step(NamedTuple):
    """A point of the path: what was found there, and the part of the natural-gradient step taken from it."""

    theta: Any
    log_likelihood: float
    decrement: float
    length: float


@dataclass(frozen=True)
class Fit:
    """A maximum-likelihood estimate by Fisher scoring, how it was reached, and its information.

    `log_likelihood` is the sum over observations. `history` has a `Step` for every point visited, the start and the
    estimate included: `theta`, `log_likelihood`, `decrement` there, and `length`, the part of the full step taken
    from there. Shown in a notebook it is a table of estimates, standard errors and their ratio z.
    """

    theta: Any
    log_likelihood: float
    steps: int
    converged: bool
    message: str
    history: tuple[Step, ...]
    _inform: Callable[[], Information] = field(repr=False, compare=False)

    @cached_property
    def information(self) -> Information:
        """Expected, observed and outer-product information at the estimate, computed when first asked for."""
        return self._inform()

    def standard_errors(self, kind: str = "expected") -> Any:
        """As `information(...).standard_errors(kind)`: "expected", "observed", "opg" or "sandwich"; like theta."""
        return self.information.standard_errors(kind)

    def _table(self) -> list[list[str]]:
        estimates = np.asarray(flatten(self.theta)[0], float)
        try:
            errors = np.asarray(flatten(self.standard_errors())[0], float)
        except ValueError:  # a singular information: the message of standard_errors() names the direction
            errors = np.full(estimates.shape, np.nan)
        rows = [["parameter", "estimate", "std. error", "z"]]
        for name, value, error in zip(parameter_names(self.theta), estimates, errors, strict=True):
            known = ["none", "none"] if np.isnan(error) else [f"{error:.4g}", f"{value / error:.3g}"]
            rows.append([name, f"{value:.4g}", *known])
        return rows

    def _note(self) -> str:
        state = "Converged" if self.converged else "Not converged"
        n = float(self.information.n)
        return f"{state}: {self.message}. Log-likelihood {self.log_likelihood:.6g}, n = {n:g}."

    def __repr__(self) -> str:
        rows = self._table()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        return "\n".join([*lines, self._note()])

    def _repr_html_(self) -> str:
        head, *rows = self._table()
        top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
        body = "".join(
            f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(c)}</td>" for c in row[1:]) + "</tr>"
            for row in rows
        )
        return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table><p>{escape(self._note())}</p>"


def fisher_scoring(
    model: Model,
    theta: Any,
    y: Any,
    x: Any = None,
    *,
    law: Law = Exact(),  # noqa: B008
    weights: Any = None,
    damping: float = 0.0,
    tolerance: float | None = None,
    max_steps: int = 50,
) -> Fit:
    r"""Maximise the likelihood by natural-gradient steps :math:`\theta + t\,F(\theta)^{-1} g(\theta)`.

    g is the mean score of the data and F the Fisher information per observation. The full step, t = 1, is tried
    first, and halved until the mean log-likelihood rises by 1e-4 t g^T F^-1 g (Armijo) at a theta inside its domain;
    where the rise is below rounding, until g^T F^-1 g falls. On a generalised linear model the full step is that of
    iteratively reweighted least squares.

    Args:
        model: `model(theta)` or `model(theta, x)`, a distribution.
        theta: where to start, a parameter pytree with d scalars, interior to its domain; units u.
        y: observations with leading axis n.
        x: inputs with leading axis n, for a conditional model.
        law: whose expectation F is: `Exact()`, or `MonteCarlo(key, draws)` where no exact one exists; sampling
            changes the steps, and the standard errors, but not the maximum.
        weights: [n], non-negative: row i counts as `weights[i]` observations.
        damping: F + damping I takes the place of F in the step, in 1/u^2. It changes the path, not the maximum.
        tolerance: converged where the decrement :math:`g^\top F^{-1} g` is at most this. The next step is
            sqrt(n decrement) standard errors long, and raises the log-likelihood by about n decrement / 2.
            1e-18 by default, 1e-10 in float32. A decrement lost in rounding also counts as converged.
        max_steps: the most steps to take.

    Returns:
        `Fit` with `.theta`, `.log_likelihood`, `.steps`, `.converged`, `.message`, `.history`, `.information` and
        `.standard_errors(kind)`. If it did not converge, `.converged` is False and a warning says why: too few
        steps, no increase, or an estimate that runs to infinity (three steps in a row, each shorter than a tenth of a
        standard error, that each took a quarter or more of the information along them; or F lost a direction).

    Raises:
        ValueError: F is singular at the start (a null direction is named) and `damping` is 0, the log-likelihood or
            the score is not finite there, `y` is outside the support, lengths differ, an option makes no sense, or
            `score_covariance` raises.

    Example:
        >>> import numpyro.distributions as dist
        >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
        >>> fit = fisher_scoring(lambda t, x: dist.Poisson(jnp.exp(x @ t)), jnp.zeros(2), jnp.array([1, 1, 3, 5]), x)
        >>> print(fit)
        parameter  estimate  std. error       z
        theta[0]    -0.2388      0.7895  -0.302
        theta[1]     0.6185      0.3288    1.88
        Converged: 5 steps, the next is below 1e-08 standard errors. Log-likelihood -5.35951, n = 4.

    Derived in the chapter "Maximum likelihood by Fisher scoring". Source: Fisher (1925); Rao (1948); Amari (1998);
    McCullagh and Nelder (1989), section 2.5.
    """
    if x is not None:
        row_count(x)
    _check_options(law, damping, tolerance, max_steps, (theta, y, x, weights))
    flat, unravel = flatten(theta)
    if bad := not_finite(x):
        raise ValueError(bad)
    likelihood = Likelihood(model, unravel, check_observations(model, theta, y, x), x, law, weights)
    if tolerance is None:
        tolerance = 1e-18 if flat.dtype == jnp.float64 else 1e-10
    flat, history, why = _climb(likelihood, flat, damping, tolerance, max_steps)
    last, converged = history[-1], why is None
    steps = len(history) - 1
    message = f"{steps} steps, the next is {_length(likelihood.n * last.decrement)}" if why is None else why
    if not converged:
        warnings.warn(f"fisher_scoring did not converge in {steps} steps: {message}", stacklevel=2)
    theta = unravel(flat)
    inform = lambda: information(model, theta, y, x, weights=weights, law=law)
    return Fit(theta, last.log_likelihood, steps, converged, message, tuple(history), inform)


def _check_options(law: Any, damping: Any, tolerance: Any, max_steps: Any, arrays: Any) -> None:
    check_law(law)
    if isinstance(law, Data):
        raise ValueError(
            "law=Data(y) steps with the outer product of gradients, which is not Fisher scoring: "
            "pass Exact() or MonteCarlo(key, draws)"
        )
    if is_traced(arrays, law):
        raise ValueError("fisher_scoring looks at values to decide when to stop: call it outside jit, vmap and grad")
    if not (np.ndim(damping) == 0 and np.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping must be a finite number, 0 or more, got {damping!r}")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance must be 0 or more, got {tolerance!r}")
    if not (isinstance(max_steps, (int, np.integer)) and max_steps >= 0):
        raise ValueError(f"max_steps must be a whole number, 0 or more, got {max_steps!r}")


def _climb(
    likelihood: Likelihood, flat: jax.Array, damping: float, tolerance: float, max_steps: int
) -> tuple[jax.Array, list[Step], str | None]:
    """The last point, the path to it, and why it is no maximum (None where it is).

    Longer than it should be, so that the order in which a fit can end is read in one place.
    """
    names, fading = parameter_names(likelihood.unravel(flat)), 0
    history: list[Step] = []
    here, step, before = likelihood.value(flat), np.zeros(flat.size), None
    if not here.legal:
        raise ValueError("the log-likelihood or its gradient is not finite at the start: choose another theta")
    while True:
        F = _information_after(len(history), likelihood, flat)
        solve, null = _solver(F, damping)
        if solve is None:
            if before is None:
                advice = "drop or combine parameters, start elsewhere, or pass a larger damping="
                raise ValueError(f"F is singular at the start along {name_direction(null, names)}: {advice}")
            # the last step is not taken: the point it led to has no next step and no standard errors
            history[-1] = history[-1]._replace(length=0.0)
            return before[0], history, f"the next step loses all information along {_infinity(null, names)}"
        fading = fading + 1 if before and _fades(before[1], F, step, likelihood.n) else 0
        step = solve(here.gradient)
        decrement = float(here.gradient @ step)
        history.append(Step(likelihood.unravel(flat), here.mean * likelihood.n, decrement, 0.0))
        if fading == 3:
            return flat, history, f"the estimate runs along {_infinity(step, names)}"
        if decrement <= tolerance and not fading and (before or max_steps == 0):
            return flat, history, None
        if len(history) > max_steps:
            return flat, history, f"max_steps reached, and the next step is {_length(likelihood.n * decrement)}"
        length, there = _search(likelihood, flat, here, step, decrement, solve)
        if length == 0:
            rounding = decrement <= _slack(here, flat.dtype) and not fading
            return flat, history, None if rounding else "no step along the natural gradient raises the likelihood"
        history[-1] = history[-1]._replace(length=length)
        before, here, step = (flat, F), there, length * step
        flat = flat + jnp.asarray(step, flat.dtype)


def _length(square: float) -> str:
    return f"{square**0.5:.1g} standard errors" if square > 1e-16 else "below 1e-08 standard errors"


def _infinity(direction: np.ndarray, names: list[str]) -> str:
    return (
        f"{name_direction(direction, names)}, as when an estimate runs to infinity: the information there tends "
        "to 0 and the likelihood has no maximum (separating_direction(x, y) decides for y in {0, 1})"
    )


def _information_after(steps: int, likelihood: Likelihood, flat: jax.Array) -> np.ndarray:
    try:
        return likelihood.information(flat)
    except ValueError as error:
        if steps == 0:
            raise
        where = np.array2string(np.asarray(flat), precision=4, threshold=8)
        raise ValueError(f"after {steps} steps of fisher_scoring, at theta = {where}: {error}") from error


def _solver(F: np.ndarray, damping: float) -> tuple[Callable[[np.ndarray], np.ndarray] | None, np.ndarray]:
    """(F + damping I)^-1 by Cholesky, in units where the diagonal is 1; or None and a null direction."""
    from scipy.linalg import cho_factor, cho_solve  # only needed here

    A = np.asarray(F + damping * np.eye(len(F)), np.float64)
    diagonal = np.diagonal(A)
    scale = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1))
    C = scale[:, None] * A * scale
    values, vectors = np.linalg.eigh(C)
    if values[0] <= 100 * len(F) * np.finfo(F.dtype).eps:
        return None, scale * vectors[:, 0]
    factor = cho_factor(C, lower=True)
    return lambda v: scale * cho_solve(factor, scale * v), scale * vectors[:, 0]


def _fades(before: np.ndarray, after: np.ndarray, step: np.ndarray, n: float) -> bool:
    """Whether a step of less than a tenth of a standard error took a quarter of the information along it."""
    had = float(step @ before @ step)
    return 0 < n * had < 0.01 and float(step @ after @ step) < FADING * had


def _slack(here: Value, dtype: Any) -> float:
    """Differences of the mean log-likelihood below this are rounding."""
    return 10 * float(jnp.finfo(dtype).eps) * here.size


def _search(
    likelihood: Likelihood, flat: jax.Array, here: Value, step: np.ndarray, decrement: float, solve: Any
) -> tuple[float, Value]:
    """The first of 1, 1/2, 1/4 ... at which the likelihood rises enough; 0 if none does."""
    length = 1.0
    for _ in range(HALVINGS):
        there = likelihood.value(flat + jnp.asarray(length * step, flat.dtype))
        rise = there.mean - here.mean
        if there.legal and rise >= ARMIJO * length * decrement:
            return length, there
        # too close to the maximum to see a rise: the slope still tells
        if there.legal and abs(rise) <= _slack(here, flat.dtype) and there.gradient @ solve(there.gradient) < decrement:
            return length, there
        length /= 2
    return 0.0, here
