"""Expectations over rows and outcomes, in blocks of bounded memory, refined until they have converged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .checks import Health, measure, verdict
from .compilation import compile_once, run
from .law import Data, Exact, Law, Plan, check_law, make_plan
from .model import (
    Conditional,
    Model,
    check_observations,
    flatten,
    is_traced,
    not_finite,
    out_of_domain,
    row_count,
    take_rows,
)
from .outcomes import Outcomes, make_outcomes
from .quadrature import bounds

BLOCK = 2**21  # scalars of the largest array held for one block of rows


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
    follow: bool = False  # whether theta is traced by the caller, and so may be differentiated
    others: tuple[Any, ...] = ()  # the parameters that theta is compared with

    def log_prob(self, flat: jax.Array, x: Any, y: jax.Array) -> jax.Array:
        """log p [k, n, m] of outcomes [k, n, ...]; differentiable in `flat`."""
        return Conditional.of(self.model, self.unravel(flat), x, split=self.plan.exact).log_prob(y)

    def outcomes(self, flat: jax.Array, rows: Rows, others: tuple[Any, ...] = (), prune: bool = True) -> Outcomes:
        thetas = (self.unravel(flat), *others)
        block = (rows.x, rows.y, rows.index)
        return make_outcomes(self.model, thetas, block, self.law, self.plan, prune, self.follow)


def prepare(
    model: Model, theta: Any, x: Any, law: Law, others: tuple[Any, ...] = (), weights: Any = None, start: int = 0
) -> Problem:
    """Check the arguments of a public function and settle how its outcomes are made; `start` numbers the first row."""
    check_law(law)
    flat, unravel = flatten(theta, later=not isinstance(law, Data))
    theta = unravel(flat)
    n = 1 if x is None else row_count(x)
    y = None
    if isinstance(law, Data):
        y = check_observations(model, theta, law.y, x)
    check_domain(model, theta, x)
    plan = make_plan(model, (theta, *others), x, law)
    weight = np.ones(n) if weights is None else weights
    rows = Rows(x, y, np.arange(start, start + n), weight)
    return Problem(model, flat, unravel, law, plan, rows, n, is_traced(flat), others)


def check_domain(model: Model, theta: Any, x: Any) -> None:
    """Distribution parameters outside their domain: numpyro would answer with NaN, or worse, with a number."""
    if is_traced(theta, x):
        return
    few = x if x is None or not_finite(x) else take_rows(x, slice(0, 1000))
    d = Conditional.of(model, theta, few, split=True).distribution
    for name, constraint in getattr(d, "arg_constraints", {}).items():
        value = d.__dict__.get(name)
        if value is None or not callable(constraint) or getattr(constraint, "is_discrete", False):
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
                f"{out_of_domain(x)}: {type(d).__name__} {name} = "
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
    weight, largest = rows_weight(rows, dtype), jnp.max(jnp.abs(flat))
    leak = _leak(problem, flat, rows, directions) if problem.plan.kind in ("line", "draws") else jnp.zeros(())
    ratios, total = measure(log_p, slope, out, weight, leak, largest, problem.plan.kind, problem.plan.exact)
    return Health(*ratios), directions, total


def _leak(problem: Problem, flat: jax.Array, rows: Rows, directions: jax.Array) -> jax.Array:
    """Probability that crosses the ends of the support per unit of theta along each direction, [p, n, m].

    A moving end where the density does not vanish; two of them can leave the mean score at 0, as for
    Uniform(theta, theta + 1).
    """

    def block(f: jax.Array) -> Conditional:
        return Conditional.of(problem.model, problem.unravel(f), rows.x, split=problem.plan.exact)

    here = block(flat)
    support = getattr(here.distribution, "support", None)
    sides = [i for i, end in enumerate(bounds(support)) if end is not None]
    if not sides or getattr(support, "is_discrete", True) or here.distribution.event_shape:
        return jnp.zeros(())

    def ends(f: jax.Array) -> jax.Array:
        found = [bounds(block(f).distribution.support)[i] for i in sides]
        return jnp.stack([jnp.broadcast_to(jnp.asarray(end, flat.dtype), here.batch) for end in found])

    places = ends(flat)
    speed = jax.vmap(lambda u: jax.jvp(ends, (flat,), (u,))[1])(directions)  # [p, sides, *batch]
    inward = jnp.asarray([(jnp.inf, -jnp.inf)[i] for i in sides], flat.dtype).reshape(-1, *[1] * (places.ndim - 1))
    tiny = float(jnp.finfo(flat.dtype).tiny) ** 0.48
    beside = jnp.where(
        places == 0, jnp.sign(inward) * tiny, jnp.nextafter(places, jnp.broadcast_to(inward, places.shape))
    )
    density = jnp.exp(here.log_prob(beside if here.conditional else beside[:, None]))  # [sides, n, m]
    speed = speed.reshape(len(directions), *density.shape)
    return jnp.sum(jnp.where(speed == 0, 0, jnp.abs(speed) * density), 1)


def rows_weight(rows: Rows, dtype: Any) -> jax.Array:
    return jnp.asarray(rows.weight, dtype)


def over_rows(
    problem: Problem, kernel: Callable[[Problem, jax.Array, Rows], tuple[Any, Health]], per_row: int
) -> tuple[Any, Health]:
    """Sum a kernel over all rows, in blocks of rows whose arrays hold about `BLOCK` scalars.

    Every block has the same length: the last one overlaps its predecessor, with weight zero where it does.
    """
    n, rows = problem.n, problem.rows
    traced = is_traced(problem.flat, rows, problem.law, problem.others)

    def compiled(flat: jax.Array, data: Rows, others: tuple[Any, ...]) -> tuple[Any, Health]:
        # theta as an argument everywhere: as a constant it would make each theta a program of its own
        return kernel(problem._replace(flat=flat, others=others), flat, data)

    blocks = -(-n * per_row // BLOCK)
    if blocks <= 1 or n == 1:
        # traced: one program under an eager vmap too, which would run every operation by itself
        compiled = jax.jit(compiled) if traced else compile_once(compiled, problem.flat, rows, problem.others)
        total, health = compiled(problem.flat, rows, problem.others)
        return total, depend(problem, health)
    length = -(-n // min(blocks, n))
    starts = np.minimum(np.arange(0, n, length), n - length)
    overlap = np.arange(0, n, length) - starts

    def block(data: Rows, start: Any, skip: Any, cut: Callable[..., Any]) -> Rows:
        part = jax.tree.map(lambda a: cut(a, start), data)
        return part._replace(weight=part.weight * (np.arange(length) >= skip))

    if traced:

        def cut(a: Any, start: Any) -> Any:
            return jax.lax.dynamic_slice_in_dim(jnp.asarray(a), start, length)

        def step(carry: Any, at: Any) -> tuple[Any, None]:
            return _add(carry, kernel(problem, problem.flat, block(rows, at[0], at[1], cut))), None

        shapes = jax.eval_shape(lambda: kernel(problem, problem.flat, block(rows, 0, 0, cut)))
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, health = jax.lax.scan(step, zero, (jnp.asarray(starts), jnp.asarray(overlap)))[0]
    else:
        result = None
        for start, skip in zip(starts, overlap, strict=True):
            part_rows = block(rows, start, skip, lambda a, s: a[s : s + length])
            if result is None:
                compiled = compile_once(compiled, problem.flat, part_rows, problem.others)
            part = compiled(problem.flat, part_rows, problem.others)
            result = part if result is None else _add(result, part)
        assert result is not None
        total, health = result
    return total, depend(problem, health)


def _add(a: tuple[Any, Health], b: tuple[Any, Health]) -> tuple[Any, Health]:
    return jax.tree.map(jnp.add, a[0], b[0]), Health(*map(jnp.maximum, a[1], b[1]))


def depend(problem: Problem, health: Health) -> Health:
    """Compare at most four rows taken together and one by one: a batch mean inside the model shows."""
    if problem.n == 1:
        return health
    few = np.unique(np.linspace(0, problem.n - 1, 4).astype(int))

    model, unravel, plan, n, follow = problem.model, problem.unravel, problem.plan, problem.n, problem.follow

    def compare(flat: jax.Array, rows: Rows, law: Law, others: tuple[Any, ...]) -> jax.Array:
        part = Problem(model, flat, unravel, law, plan, rows, n, follow, others)
        y = part.outcomes(flat, rows).y
        y = y[len(y) // 2][None]
        together = part.log_prob(flat, rows.x, y)[0]

        def alone(row: Any, value: jax.Array) -> jax.Array:
            return part.log_prob(flat, jax.tree.map(lambda a: a[None], row), value[:, None])[0, 0]

        single = jax.vmap(alone, in_axes=(0, 1))(rows.x, y)
        slack = 1e4 * jnp.finfo(together.dtype).eps * (1 + jnp.abs(single))
        return jnp.any(jnp.isfinite(single) & jnp.isfinite(together) & (jnp.abs(single - together) > slack))

    sample = jax.tree.map(lambda a: a[few], problem.rows)
    law = Data(None) if isinstance(problem.law, Data) else problem.law  # whose observations are in the rows
    different = run(compare, problem.flat, sample, law, problem.others)
    return health._replace(dependent=2.0 * different)


def evaluate(
    problem: Problem, kernel: Callable[[Problem, jax.Array, Rows], tuple[Any, Health]], per_row: int, width: int = 1
) -> Any:
    """Sum over rows, refine the quadrature until it has converged, and raise where a check fails.

    `per_row` counts scalars a row needs whatever the rule, `width` those for each of its outcomes.
    """
    return settle(problem, kernel, per_row, width)[0]


def settle(
    problem: Problem, kernel: Callable[[Problem, jax.Array, Rows], tuple[Any, Health]], per_row: int, width: int = 1
) -> tuple[Any, Problem]:
    """As `evaluate`; also the problem with the rule that converged."""
    while True:
        total, health = over_rows(problem, kernel, per_row + width * problem.plan.size)
        law = problem.law
        if is_traced(total, health) or not isinstance(law, Exact) or not float(health.refine) > 1:
            return verdict(problem.law, total, health, problem.flat), problem
        finer = problem.plan.finer(law.max_outcomes)
        if finer is None:
            return verdict(problem.law, total, health, problem.flat), problem
        problem = problem._replace(plan=finer)
