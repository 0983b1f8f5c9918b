"""Expectations over rows and outcomes: blocks of bounded memory, and the checks that make `Exact()` exact.

The checks use nothing of the three definitions: the total mass of the rule, the mean of directional
derivatives of log p (zero when differentiation passes through the integral), the same sums on the
nested rule of twice the step, and what the outermost outcomes still contribute.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .law import Data, Exact, Law, Plan, check_law, make_plan
from .model import (
    Conditional,
    Model,
    check_observations,
    flatten,
    is_traced,
    require,
    row_count,
    take_rows,
)
from .outcomes import Outcomes, make_outcomes

BLOCK = 2**21  # scalars of the largest array held for one block of rows


class Health(NamedTuple):
    """Largest error of each check in units of what is tolerated; above 1 is a failure."""

    mass: Any = 0.0
    score: Any = 0.0
    refine: Any = 0.0
    tail: Any = 0.0
    undefined: Any = 0.0
    edge: Any = 0.0
    dependent: Any = 0.0
    regularity: Any = 0.0


class Rows(NamedTuple):
    """A block of rows: inputs, observations, row numbers and the weight of each row."""

    x: Any
    y: Any
    index: Any
    weight: Any


class Problem(NamedTuple):
    """One call, checked: flat parameters, how to unravel them, and all rows."""

    model: Model
    flat: jax.Array
    unravel: Callable[[jax.Array], Any]
    law: Law
    plan: Plan
    rows: Rows
    n: int

    def log_prob(self, flat: jax.Array, x: Any, y: jax.Array) -> jax.Array:
        """log p [k, n, m] of outcomes [k, n, ...]; differentiable in `flat`."""
        return Conditional.of(self.model, self.unravel(flat), x, split=self.plan.exact).log_prob(y)

    def outcomes(self, flat: jax.Array, rows: Rows, others: tuple[Any, ...] = (), prune: bool = True) -> Outcomes:
        thetas = (self.unravel(flat), *others)
        return make_outcomes(self.model, thetas, (rows.x, rows.y, rows.index), self.law, self.plan, prune)


def prepare(model: Model, theta: Any, x: Any, law: Law, others: tuple[Any, ...] = (), weights: Any = None) -> Problem:
    """Check the arguments of a public function and settle how its outcomes are made."""
    check_law(law)
    flat, unravel = flatten(theta)
    theta = unravel(flat)
    n = 1 if x is None else row_count(x)
    y = None
    if isinstance(law, Data):
        y = check_observations(model, theta, law.y, x)
    _check_domain(model, theta, x)
    plan = make_plan(model, (theta, *others), x, law)
    weight = np.ones(n) if weights is None else weights
    return Problem(model, flat, unravel, law, plan, Rows(x, y, np.arange(n), weight), n)


def _check_domain(model: Model, theta: Any, x: Any) -> None:
    """Distribution parameters outside their domain: numpyro would answer with NaN, or worse, with a number."""
    if is_traced(theta, x):
        return
    few = x if x is None else take_rows(x, slice(0, 1000))
    d = Conditional.of(model, theta, few, split=True).distribution
    for name, constraint in getattr(d, "arg_constraints", {}).items():
        value = d.__dict__.get(name)
        if value is None or not hasattr(constraint, "__call__") or getattr(constraint, "is_discrete", False):
            continue
        try:
            ok = np.asarray(constraint(value))
        except Exception:  # noqa: BLE001 - a constraint that cannot be evaluated decides nothing
            continue
        if not ok.all():
            slack = 1e3 * np.finfo(np.asarray(value).dtype).eps if type(constraint).__name__ == "_Simplex" else 0
            if slack and np.all(np.abs(np.sum(value, -1) - 1) <= slack) and np.all(np.asarray(value) >= 0):
                continue
            raise ValueError(
                f"theta is outside its domain: it gives {type(d).__name__} {name} = "
                f"{np.array2string(np.asarray(value), threshold=6)}, which is not {constraint}"
            )


def probes(d: int, plan: Plan, many: bool, dtype: Any) -> np.ndarray:
    """Directions [p, d] in which the checks look: every axis of a small problem, fixed random signs otherwise."""
    if d <= 8 and not many:
        return np.eye(d, dtype=dtype)
    count = 1 if plan.enumerated else 2
    return np.random.default_rng(0).choice([-1.0, 1.0], (count, d)).astype(dtype)


def inspect(problem: Problem, flat: jax.Array, rows: Rows, out: Outcomes) -> tuple[Health, jax.Array, jax.Array]:
    """Check a block; also the directions [p, d] looked along and the information [p] found there, summed over rows."""
    flat = jax.lax.stop_gradient(flat)
    dtype = flat.dtype
    directions = jnp.asarray(probes(flat.size, problem.plan, problem.n > 1, dtype))

    def along(u: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(lambda f: problem.log_prob(f, rows.x, out.y), (flat,), (u,))

    log_p, slope = jax.vmap(along, out_axes=(None, 0))(directions)  # [k, n, m], [p, k, n, m]
    ratios, total = _measure(
        log_p, slope, out, rows_weight(rows, dtype), jnp.max(jnp.abs(flat)), problem.plan.kind, problem.plan.exact
    )
    return Health(*ratios), directions, total


@partial(jax.jit, static_argnames=("kind", "exact"))
def _measure(
    log_p: jax.Array, slope: jax.Array, out: Outcomes, weight: jax.Array, largest: jax.Array, kind: str, exact: bool
) -> tuple[Health, jax.Array]:
    """The checks as ratios to what is tolerated, and the information along each direction, summed over rows."""
    dtype, eps = log_p.dtype, float(jnp.finfo(log_p.dtype).eps)
    w = jnp.where(out.log_r > -jnp.inf, out.weight, 0.0)
    bad = jnp.any(jnp.isnan(log_p) & (w > 0)) | jnp.any(~jnp.isfinite(slope) & (w > 0))
    slope = jnp.where(w > 0, slope, 0.0)
    square = (jnp.sqrt(w) * slope) ** 2
    info = jnp.sum(square, 1)  # [p, n, m]
    total = jnp.sum(weight[:, None] * info, (1, 2))
    if not exact:
        return Health(undefined=2.0 * bad), total

    tolerance, fine = (1e-7, 1e-9) if eps < 1e-10 else (2e3 * eps, 1e3 * eps)
    slack = tolerance + 100 * out.resolution
    mass = jnp.sum(w, 0)
    mean = jnp.abs(jnp.sum(w * slope, 1))
    # rounding: a slope is no more accurate than eps in units of 1 / |theta|
    floor = 1e-6 * jnp.max(jnp.sqrt(info), (1, 2), keepdims=True) + 1e3 * eps / (tolerance * (1e-3 + largest))
    health = Health(
        mass=jnp.max(jnp.abs(mass - 1) / slack),
        score=jnp.max(mean / (slack * jnp.maximum(jnp.sqrt(info), floor))),
        undefined=2.0 * bad,
        edge=2.0 * out.edge,
    )
    scaled = square / jnp.maximum(info, floor**2)[:, None]  # [p, k, n, m]
    if out.coarse is not None:
        excess = jnp.asarray(out.coarse, dtype)[:, None, None] - 1
        refine = jnp.maximum(jnp.abs(jnp.sum(excess * w, 0)), jnp.max(jnp.abs(jnp.sum(excess * scaled, 1)), 0))
        health = health._replace(refine=jnp.max(refine / (fine + 100 * out.resolution)))
    if kind in ("line", "counts"):
        last = jnp.where(outermost(w, kind), jnp.maximum(w, jnp.max(scaled, 0)), 0)
        health = health._replace(tail=jnp.max(last) / fine)
    return health, total


def outermost(w: jax.Array, kind: str) -> jax.Array:
    """Outcomes [k, n, m] beside one of weight zero or at the end of the rule; a count at the start has mass there."""
    some = w > 0
    none = jnp.zeros_like(some[:1])
    last = some & ~(jnp.concatenate([none, some[:-1]]) & jnp.concatenate([some[1:], none]))
    return last.at[0].set(False) if kind == "counts" else last


def rows_weight(rows: Rows, dtype: Any) -> jax.Array:
    return jnp.asarray(rows.weight, dtype)


def over_rows(
    problem: Problem, kernel: Callable[[Problem, jax.Array, Rows], tuple[Any, Health]], per_row: int
) -> tuple[Any, Health]:
    """Sum a kernel over all rows, in blocks of rows whose arrays hold about `BLOCK` scalars.

    Every block has the same length: the last one overlaps its predecessor, with weight zero where it does.
    """
    n, rows = problem.n, problem.rows
    traced = is_traced(problem.flat, rows, problem.law)

    def compiled(flat: jax.Array, data: Rows) -> tuple[Any, Health]:
        return kernel(problem, flat, data)

    if not traced:  # compiled anew by every call: a cache would answer for a model whose globals have changed
        compiled = jax.jit(compiled)
    blocks = -(-n * per_row // BLOCK)
    if blocks <= 1 or n == 1:
        total, health = compiled(problem.flat, rows)
        return total, _depend(problem, health)
    length = -(-n // min(blocks, n))
    starts = np.minimum(np.arange(0, n, length), n - length)
    overlap = np.arange(0, n, length) - starts

    def block(data: Rows, start: Any, skip: Any, cut: Callable[[Any, Any], Any]) -> Rows:
        part = jax.tree.map(lambda a: cut(a, start), data)
        return part._replace(weight=part.weight * (np.arange(length) >= skip))

    if traced:

        def cut(a: Any, start: Any) -> Any:
            return jax.lax.dynamic_slice_in_dim(jnp.asarray(a), start, length)

        def step(carry: Any, at: Any) -> tuple[Any, None]:
            return _add(carry, kernel(problem, problem.flat, block(rows, *at, cut))), None

        shapes = jax.eval_shape(lambda: kernel(problem, problem.flat, block(rows, 0, 0, cut)))
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, health = jax.lax.scan(step, zero, (jnp.asarray(starts), jnp.asarray(overlap)))[0]
    else:
        result = None
        for start, skip in zip(starts, overlap, strict=True):
            part = compiled(problem.flat, block(rows, start, skip, lambda a, s: a[s : s + length]))
            result = part if result is None else _add(result, part)
        assert result is not None
        total, health = result
    return total, _depend(problem, health)


def _add(a: tuple[Any, Health], b: tuple[Any, Health]) -> tuple[Any, Health]:
    return jax.tree.map(jnp.add, a[0], b[0]), Health(*map(jnp.maximum, a[1], b[1]))


def _depend(problem: Problem, health: Health) -> Health:
    """Compare at most four rows taken together and one by one: a batch mean inside the model shows."""
    if problem.n == 1:
        return health
    few = np.unique(np.linspace(0, problem.n - 1, 4).astype(int))

    def compare(flat: jax.Array, rows: Rows) -> jax.Array:
        y = problem.outcomes(flat, rows).y
        y = y[len(y) // 2][None]
        together = problem.log_prob(flat, rows.x, y)[0]

        def alone(row: Any, value: jax.Array) -> jax.Array:
            return problem.log_prob(flat, jax.tree.map(lambda a: a[None], row), value[:, None])[0, 0]

        single = jax.vmap(alone, in_axes=(0, 1))(rows.x, y)
        slack = 1e4 * jnp.finfo(together.dtype).eps * (1 + jnp.abs(single))
        return jnp.any(jnp.isfinite(single) & jnp.isfinite(together) & (jnp.abs(single - together) > slack))

    different = jax.jit(compare)(problem.flat, jax.tree.map(lambda a: a[few], problem.rows))
    return health._replace(dependent=2.0 * different)


def evaluate(
    problem: Problem, kernel: Callable[[Problem, jax.Array, Rows], tuple[Any, Health]], per_row: int, width: int = 1
) -> Any:
    """Sum over rows, refine the quadrature until it has converged, and raise where a check fails.

    `per_row` counts scalars a row needs whatever the rule, `width` those for each of its outcomes.
    """
    while True:
        total, health = over_rows(problem, kernel, per_row + width * problem.plan.size)
        law = problem.law
        if is_traced(total, health) or not isinstance(law, Exact) or not float(health.refine) > 1:
            return verdict(problem, total, health)
        finer = problem.plan.finer(law.max_outcomes)
        if finer is None:
            return verdict(problem, total, health)
        problem = problem._replace(plan=finer)


MESSAGES = {  # in the order in which they explain each other
    "dependent": "the rows of the model depend on each other: log_prob of a row changes with the rows beside it "
    "(a batch mean?); an information per observation needs rows that are independent given theta",
    "undefined": "log_prob or its derivative is not finite at a possible outcome: is theta inside its domain, "
    "and is log_prob differentiable there?",
    "edge": "theta is at the edge of its set: an outcome impossible at theta is possible beside it, so the score, "
    "Hellinger and KL definitions differ there; move theta inside",
    "tail": "the integral does not converge: the outermost outcomes still contribute, so the information is infinite, "
    "or log_prob cannot be evaluated far enough out; if it is finite, pass law=MonteCarlo(key, draws) or "
    "reparametrise",
    "refine": "the quadrature did not converge, as with a kink, a jump or a narrow peak inside the support: "
    "pass law=Exact(breakpoints=(...)) at those points, or law=MonteCarlo(key, draws)",
    "mass": "the outcomes have total probability other than 1: the density is not normalised, or the rule missed "
    "a mode or a tail (pass law=Exact(around=..., breakpoints=...))",
    "score": "the mean score is not 0, so differentiation does not pass through the integral: the support moves with "
    "theta (as for Uniform(0, theta)), or the density is normalised at this theta only; no Fisher information exists",
    "regularity": "the second derivative of log p misses part of the curvature (a kink that moves with theta, as for "
    "Laplace location): Bartlett's identity fails; use score_covariance or hellinger_jacobian",
}


def verdict(problem: Problem, value: Any, health: Health) -> Any:
    """Raise for the first failed check: at once where values are known, through `equinox.error_if` under jit."""
    ratios = health if is_traced(health) else Health(*map(float, health))
    for name, message in MESSAGES.items():
        value = require(getattr(ratios, name) <= 1, value, f"{type(problem.law).__name__}: {message}")  # NaN fails too
    return value
