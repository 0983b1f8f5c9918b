"""The root R of the Fisher information, F = R^T R: rows are inputs and outcomes, columns are parameters.

R is linear in theta's tangent: `R v` pushes v forward through the model and weighs what arrives (by a family's closed
form, or by the square root of each outcome's probability), `R^T u` pulls back. Neither forms R.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from .checks import Health, verdict
from .compilation import hide_constants, run
from .dependence import depends
from .expectation import Problem, Rows, check_domain, depend, inspect, prepare, rows_weight, settle
from .families import find_family, own_parameters, push_forward
from .law import Data, Exact, Law, Plan, check_law
from .model import Conditional, Model, by_identity, call, flatten, is_traced, out_of_domain, row_count, take_rows
from .part import Part, PartOfModel

CAP = 2**26  # scalars that may be held at once

Map = Callable[[Any], Any]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["part", "theta", "law", "rows"],
    meta_fields=["whole", "plan", "varying", "total"],
)
@dataclass(frozen=True)
class Root:
    """The root at one theta over a block of rows; R has the shape [n, r, d] of rows, outcomes and parameters.

    `varying` marks the distribution's own parameters that depend on theta where the family has a closed form, and is
    None where the law's outcomes are used. `total` is the n of the mean, which a block of rows keeps. Of a model of a
    `part` of its parameters, the others are data here, as theta is: they may be traced.
    """

    whole: Model
    part: Part | None
    theta: Any
    law: Law
    plan: Plan
    rows: Rows
    varying: tuple[bool, ...] | None
    total: int

    @property
    def model(self) -> Model:
        return self.whole if self.part is None else PartOfModel(self.whole, self.part)

    @property
    def flat(self) -> jax.Array:
        return ravel_pytree(self.theta)[0]

    @property
    def unravel(self) -> Callable[[jax.Array], Any]:
        return ravel_pytree(self.theta)[1]

    @property
    def n(self) -> int:
        return len(self.rows.index)

    @property
    def d(self) -> int:
        return sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(self.theta))

    def problem(self) -> Problem:
        flat = self.flat
        return Problem(self.model, flat, self.unravel, self.law, self.plan, self.rows, self.n, is_traced(flat))


def make_root(
    model: Model, theta: Any, x: Any = None, *, law: Law = Exact(), weights: Any = None, start: int = 0
) -> Root:
    """Check the arguments, settle how the outcomes are made, and hold what R needs; weights have mean 1.

    `start` is the number of the first row of x, by which draws are keyed.
    """
    check_law(law)
    whole, part = (model.model, model.part) if isinstance(model, PartOfModel) else (by_identity(model), None)
    flat, unravel = flatten(theta, later=True)
    strong = lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf))  # of the type that `unravel` gives
    # inside jit theta as it was given: cut out of one vector again, each part would be a program of its own
    theta = hide_constants(jax.tree.map(strong, theta)) if is_traced(flat) else unravel(flat)
    n = 1 if x is None else row_count(x)
    weight = np.ones(n) if weights is None else weights
    varying = _closed_form(model, theta, x) if isinstance(law, Exact) else None
    if varying is not None:
        check_domain(model, theta, x)
        rows = Rows(x, None, np.arange(start, start + n), weight)
        root = Root(whole, part, theta, law, Plan("closed"), rows, varying, n)
        return replace(root, theta=_checked(root))
    problem = prepare(model, theta, x, law, weights=weights, start=start)
    if isinstance(law, Exact):  # the sampled laws are checked where they are made

        def checks(problem: Problem, flat: jax.Array, rows: Rows) -> tuple[jax.Array, Health]:
            return jnp.sum(flat), inspect(problem, flat, rows, problem.outcomes(flat, rows))[0]

        value, problem = settle(problem, checks, flat.size, 4)
        theta = jax.tree.map(lambda leaf: leaf + 0 * value, theta) if is_traced(value) else theta
    else:
        theta = verdict(law, theta, depend(problem, Health()), problem.flat)
    kept = Data(None) if isinstance(law, Data) else law
    return Root(whole, part, theta, kept, problem.plan, problem.rows, None, n)


def _closed_form(model: Model, theta: Any, x: Any) -> tuple[bool, ...] | None:
    """Which of the family's parameters depend on theta; None where there is no closed form for those."""
    first, families = None if x is None else take_rows(x, slice(0, 1)), []

    def look(theta: Any) -> tuple[jax.Array, ...]:
        distribution = Conditional.of(model, theta, first, split=False).distribution  # its checks of the batch shape
        families.append(find_family(distribution))
        return own_parameters(distribution) if families[-1] else ()

    varying, family = depends(look, theta), families[-1]
    if family is None:
        return None
    blocked = any(v and name in family.fixed for v, name in zip(varying, family.parameters, strict=True))
    return None if blocked or not any(varying) else varying


def _checked(root: Root) -> Any:
    """theta, or an error where rows depend on each other, or a parameter is at the edge of its set and moves."""
    model, few = root.model, tuple(int(row) for row in np.unique(np.linspace(0, root.n - 1, 4).astype(int)))

    def compare(theta: Any, x: Any) -> jax.Array:
        x = take_rows(x, np.asarray(few))
        own = lambda x: own_parameters(call(model, theta, x))
        single = jax.vmap(lambda row: [p[0] for p in own(jax.tree.map(lambda a: a[None], row))])(x)
        known = lambda v: jnp.nan_to_num(v, posinf=0.0, neginf=0.0)  # what is not finite is named elsewhere
        pairs = [(known(together), known(alone)) for together, alone in zip(own(x), single, strict=True)]
        gap = jnp.max(jnp.stack([jnp.max(jnp.abs(together - alone)) for together, alone in pairs]))
        size = 1 + jnp.max(jnp.stack([jnp.max(jnp.abs(alone)) for _, alone in pairs]))
        return gap / (1e4 * jnp.finfo(size.dtype).eps * size)

    dependent = run(compare, root.theta, root.rows.x) if root.n > 1 else 0.0
    if is_traced(root):
        return verdict(root.law, root.theta, Health(dependent=dependent), root.flat)
    at_edge, leaves, nan = run(_at_edge, root)
    if nan:
        raise ValueError(f"{out_of_domain(root.rows.x)}: it gives NaN for the parameters of the distribution")
    return verdict(root.law, root.theta, Health(dependent=dependent, edge=2.0 * at_edge, score=2.0 * leaves))


def _at_edge(root: Root) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Whether, when theta moves, a probability or rate at the edge of its set leaves it, or probabilities their sum.

    And whether a parameter is NaN.
    """
    family = find_family(call(root.model, root.theta, root.rows.x))
    assert family is not None
    names = family.parameters
    axes = len(Conditional.of(root.model, root.theta, root.rows.x, split=True).distribution.batch_shape)
    outside = {"probs": lambda p: (p <= 0) | (p >= 1), "rate": lambda rate: rate <= 0}

    def look(theta: Any) -> tuple[jax.Array, ...]:
        values = own_parameters(call(root.model, theta, root.rows.x))
        found = [jnp.ravel(outside[name](v)) for name, v in zip(names, values, strict=True) if name in outside]
        classes = [v for name, v in zip(names, values, strict=True) if name == "probs" and v.ndim > axes]
        total = [jnp.max(jnp.abs(jnp.sum(p, -1) - 1)) for p in classes]
        nan = jnp.stack([jnp.any(jnp.isnan(value)) for value in values])
        return jnp.concatenate(found or [jnp.zeros(1, bool)]), jnp.stack(total or [jnp.zeros(())]), jnp.any(nan)

    moved = [jax.tree.map(lambda t, s=s: t + s * 1e-5 * (1 + jnp.abs(t)), root.theta) for s in (1.0, -1.0)]
    (here, _, nan), (up, total, _), (down, other, _) = look(root.theta), look(moved[0]), look(moved[1])
    off = jnp.max(jnp.maximum(total, other)) > jnp.sqrt(jnp.finfo(root.flat.dtype).eps)
    return jnp.any(here & ~(up & down)), off, nan


# --- what R is made of: smooth outputs of the model, and a linear map from their tangents to rows ----------------


def outputs(root: Root, theta: Any) -> tuple[jax.Array, ...]:
    """What theta moves: the family's parameters, or the log-probabilities [k, n, m] of the outcomes."""
    if root.varying is None:
        problem = root.problem()
        return (problem.log_prob(ravel_pytree(theta)[0], root.rows.x, _outcomes(problem)[0]),)
    values = own_parameters(call(root.model, theta, root.rows.x))
    return tuple(value for value, moves in zip(values, root.varying, strict=True) if moves)


def _outcomes(problem: Problem) -> tuple[jax.Array, jax.Array]:
    out = problem.outcomes(problem.flat, problem.rows)
    return jax.lax.stop_gradient(out.y) if not jnp.issubdtype(out.y.dtype, jnp.integer) else out.y, out.weight


def push(root: Root) -> Map:
    """The linear map from tangents of `outputs` to the rows [n, r] of R, square roots of weights included."""
    flat, n = root.flat, root.n
    weight = jnp.sqrt(rows_weight(root.rows, flat.dtype) / root.total)[:, None]
    if root.varying is None:
        root_p = jnp.sqrt(_outcomes(root.problem())[1])  # [k, n, m]
        return lambda tangents: jnp.moveaxis(root_p * tangents[0], 0, -1).reshape(n, -1) * weight
    distribution, varying = call(root.model, root.theta, root.rows.x), root.varying

    def rows(tangents: tuple[jax.Array, ...]) -> jax.Array:
        left = iter(tangents)
        return (
            push_forward(distribution, tuple(next(left) if moves else None for moves in varying)).reshape(n, -1)
            * weight
        )

    return rows


def linearize(root: Root) -> Map:
    """v [d] -> R v [n, r] with everything that does not depend on v computed already."""
    linear, unravel = linear_map(root), root.unravel
    return lambda v: linear(unravel(v))


def linear_map(root: Root) -> Map:
    """`linearize` for v like theta: no copy of v is made, and the map is a pytree itself."""

    def whole(v: Any) -> jax.Array:
        return push(root)(jax.jvp(lambda theta: outputs(root, theta), (root.theta,), (v,))[1])

    return jax.linearize(whole, jax.tree.map(jnp.zeros_like, root.theta))[1]


def transpose(linear: Map, v: Any) -> Map:
    """u [n, r] -> R^T u; `v` has the form of what `linear` takes."""
    return lambda u: jax.linear_transpose(linear, v)(u)[0]


def leaf_rows(root: Root) -> list[jax.Array]:
    """R as one array [n, r, size] per leaf of theta, by forward or reverse mode, whichever needs fewer passes."""
    sizes = [int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(root.theta)]
    leaves = lambda rows: jnp.split(rows, np.cumsum(sizes)[:-1], -1)

    def row(rows: Rows) -> list[jax.Array]:
        linear, flat = linearize(replace(root, rows=rows)), root.flat
        shape = jax.eval_shape(linear, flat)
        if root.d <= shape.size:
            return leaves(jnp.moveaxis(jax.vmap(linear)(jnp.eye(root.d, dtype=flat.dtype)), 0, -1)[0])
        units = jnp.eye(shape.size, dtype=shape.dtype).reshape(-1, *shape.shape)
        return jax.vmap(lambda u: leaves(transpose(linear, flat)(u)))(units)

    if root.rows.x is None:
        return [part[None] for part in row(root.rows)]
    return jax.vmap(row)(jax.tree.map(lambda a: jnp.asarray(a)[:, None], root.rows))


def dense_rows(root: Root) -> jax.Array:
    """R as an array [n, r, d]."""
    return jnp.concatenate(leaf_rows(root), -1)


def row_shape(root: Root) -> int:
    """Number r of rows of R for one input."""
    one = root if root.rows.x is None else replace(root, rows=jax.tree.map(lambda a: jnp.asarray(a)[:1], root.rows))
    return int(jax.eval_shape(lambda r: linearize(r)(r.flat), one).size)


def residuals(root: Root) -> int:
    """Scalars that a linearised R holds."""
    kept = jax.eval_shape(lambda r: jax.tree.leaves(linear_map(r)), root)
    return sum(leaf.size for leaf in kept)
