"""The likelihood of data and the information in it at any theta, by programs compiled once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .checks import Health, verdict
from .compilation import compile_once
from .expectation import Rows, over_rows, prepare
from .inference import _row_weights
from .law import Exact, Law, Plan
from .model import Conditional, Model
from .score import _outer_products, _output_size


class Value(NamedTuple):
    """Mean log-likelihood, its gradient [d], the mean size of its terms, and whether theta is inside its domain."""

    mean: float
    gradient: np.ndarray
    size: float
    legal: bool


class Likelihood:
    """The data's mean log-likelihood and the information, each one compiled program for all steps of a fit."""

    def __init__(self, model: Model, unravel: Any, y: jax.Array, x: Any, law: Law, weights: Any) -> None:
        w = _row_weights(weights, len(y))
        self.model, self.unravel, self.y, self.x, self.law = model, unravel, y, x, law
        self.n = float(jnp.sum(w))
        self.weight = w * len(y) / jnp.sum(w)  # of mean 1
        self.programs: dict[Any, Callable[..., Any]] = {}
        self.plan: Plan | None = None

    def value(self, flat: jax.Array) -> Value:
        args = (flat, self.x, self.y, self.weight.astype(flat.dtype))
        if "value" not in self.programs:
            self.programs["value"] = compile_once(jax.value_and_grad(self._value, has_aux=True), *args)
        (mean, (size, legal)), gradient = self.programs["value"](*args)
        legal = bool(legal) and bool(np.isfinite(mean)) and bool(np.isfinite(gradient).all())
        return Value(float(mean), np.asarray(gradient, float), float(size), legal)

    def _value(self, flat: jax.Array, x: Any, y: jax.Array, weight: jax.Array) -> Any:
        block = Conditional.of(self.model, self.unravel(flat), x, split=False)
        log_p = block.of_observations(y)
        return jnp.mean(weight * log_p), (jnp.mean(weight * jnp.abs(log_p)), inside(block.distribution))

    def information(self, flat: jax.Array) -> np.ndarray:
        """`score_covariance` with the rows' weights, refined as there; the rule that converged serves the next step."""
        weight = None if self.x is None else self.weight
        problem = prepare(self.model, self.unravel(flat), self.x, self.law, weights=weight)
        if self.plan is not None and problem.plan.size <= self.plan.size <= 8 * problem.plan.size:
            problem = problem._replace(plan=self.plan)  # already compiled, and fine enough
        while True:
            key, args = problem.plan, (flat, problem.rows)
            if key not in self.programs:
                self.programs[key] = compile_once(lambda f, r, p=problem: _covariance(p, f, r), *args)
            F, health = self.programs[key](*args)
            finer = problem.plan.finer(self.law.max_outcomes) if isinstance(self.law, Exact) else None
            if finer is None or float(health.refine) <= 1:
                self.plan = problem.plan
                return np.asarray(verdict(self.law, F, health))
            problem = problem._replace(plan=finer)


def _covariance(problem: Any, flat: jax.Array, rows: Rows) -> tuple[jax.Array, Health]:
    problem = problem._replace(flat=flat, rows=rows)
    size, d = _output_size(problem), flat.size
    width = d if size is None else size
    F, health = over_rows(problem, _outer_products, (size or 1) * d + width * problem.plan.size)
    return (F + F.T) / (2 * problem.n), health


def inside(distribution: Any) -> jax.Array:
    """Whether the distribution's parameters meet their constraints, in every row."""
    ok = jnp.ones((), bool)
    for name, constraint in getattr(distribution, "arg_constraints", {}).items():
        value = distribution.__dict__.get(name)
        if value is None or not callable(constraint) or getattr(constraint, "is_discrete", False):
            continue
        if type(constraint).__name__ == "_Simplex":  # its tolerance is not that of float32
            ok &= jnp.all(value >= 0)
        else:
            ok &= jnp.all(constraint(value))
    return ok
