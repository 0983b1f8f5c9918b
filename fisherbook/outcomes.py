"""The outcomes of a block of rows, with the weights that turn a sum over them into an expectation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .law import Exact, Law, MonteCarlo, Plan, is_boolean
from .model import Conditional, Model, call, is_traced, sample
from .quadrature import bounds, count_window, line_rule, normal_rule


class Outcomes(NamedTuple):
    """E[g] = sum_k weight_k g(y_k); weight_k = r_k p(y_k). Impossible outcomes are replaced and weigh nothing."""

    y: jax.Array  # [k, n, *sites, *event]
    weight: jax.Array  # [k, n, m]
    log_r: jax.Array  # [k, n, m]
    coarse: np.ndarray | None  # [k]
    resolution: jax.Array | float  # [n, m]
    edge: jax.Array  # an impossible outcome is possible at a neighbouring theta


def make_outcomes(
    model: Model, thetas: Sequence[Any], block: Any, law: Law, plan: Plan, prune: bool = True, follow: bool = False
) -> Outcomes:
    """The outcomes of a block of rows, placed by p_theta for every theta given and weighted by the first.

    `block` is (x, y, index): inputs, observations and the row numbers that key the draws. The outcomes stand still
    when theta is differentiated; with `follow` their weights move, as the density does.
    """
    x, y, index = block
    moving = thetas[0]
    thetas = jax.lax.stop_gradient(tuple(thetas))
    p = Conditional.of(model, thetas[0], x, split=plan.exact)
    log_r: Any = 0.0
    coarse: np.ndarray | None = None
    resolution: Any = 0.0
    if not plan.exact:
        if plan.kind == "data":
            y = y[None] if x is not None else y[:, None]
        else:
            assert isinstance(law, MonteCarlo)
            y = _draw(model, thetas[0], x, index, law)
        log_p = p.log_prob(y)
        weight = jnp.full(log_p.shape, 1.0 / len(y), log_p.dtype)
        if follow and plan.kind == "draws":
            weight = weight * _ratio(Conditional.of(model, moving, x, split=False).log_prob(y))
        return Outcomes(y, weight, -jnp.log(float(len(y))) - log_p, None, 0.0, jnp.zeros((), bool))
    assert isinstance(law, Exact)
    all_p = [p] + [Conditional.of(model, t, x, split=True) for t in thetas[1:]]
    families = [b.distribution for b in all_p]
    if plan.kind == "table":
        table = jnp.asarray(families[0].outcomes)
        y = jnp.broadcast_to(
            table.reshape(len(table), *[1] * (1 + len(p.sites)), *table.shape[1:]),
            (len(table), p.rows, *p.sites, *table.shape[1:]),
        )
    elif plan.kind == "integers":
        lower = jnp.asarray(0 if is_boolean(families[0].support) else bounds(families[0].support)[0], int)
        upper = jnp.asarray(1 if is_boolean(families[0].support) else bounds(families[0].support)[1], int)
        lower, upper = (jnp.broadcast_to(b, p.batch) for b in (lower, upper))
        y = lower + jnp.arange(plan.size).reshape(-1, *[1] * len(p.batch))
        log_r = jnp.where(y <= upper, 0.0, -jnp.inf)
        y = jnp.minimum(y, upper)
    elif plan.kind == "counts":
        y = count_window(families, plan.size)
    else:
        if plan.kind == "line":
            rule = line_rule(families, plan.level, law.breakpoints, law.around)
        else:
            rule = normal_rule(families, plan.level)
        y, log_r, coarse, resolution = rule
        resolution = jnp.reshape(jnp.broadcast_to(resolution, p.batch), (p.rows, -1))
    y = y if p.conditional or plan.kind == "table" else y[:, None]
    log_p = p.log_prob(y)
    # a density that is nan far out weighs nothing there; the checks of mass and tail say whether that is allowed
    log_p = jnp.where(p.inside(y) & ~jnp.isnan(log_p), log_p, -jnp.inf)
    log_r = jnp.broadcast_to(_sites(log_r, p, len(y)), log_p.shape)
    weight = jnp.exp(log_p + log_r)
    edge = _at_edge(model, thetas[0], x, y, log_p + log_r) if plan.enumerated else jnp.zeros((), bool)
    possible, log_s = _prune(y, weight, log_r, len(p.sites)) if prune or follow else (y, log_r)
    if follow:
        ratio = _ratio(Conditional.of(model, moving, x, split=True).log_prob(possible))
        weight = weight * jnp.where(weight > 0, ratio, 1)
    if prune:
        y, log_r = possible, log_s
    return Outcomes(y, weight, log_r, coarse, resolution, edge)


def _ratio(log_p: jax.Array) -> jax.Array:
    """p over itself held fixed: 1, with the derivative of the density."""
    return jnp.exp(log_p - jax.lax.stop_gradient(log_p))


def _sites(value: Any, p: Conditional, k: int) -> jax.Array:
    value = jnp.asarray(value, float)
    return value if value.ndim == 0 else jnp.reshape(jnp.broadcast_to(value, (k, *p.batch)), (k, p.rows, -1))


@partial(jax.jit, static_argnames="sites")
def _prune(y: jax.Array, weight: jax.Array, log_r: jax.Array, sites: int) -> tuple[jax.Array, jax.Array]:
    """Replace outcomes of weight zero by the likeliest: reverse mode would spread their NaN to every row."""
    axes = y.shape[: 2 + sites]
    shape = (*axes, *[1] * (y.ndim - len(axes)))
    best = jnp.argmax(weight, 0).reshape(1, *shape[1:])
    likely = jnp.take_along_axis(y, jnp.broadcast_to(best, (1, *y.shape[1:])), 0)
    return jnp.where((weight > 0).reshape(shape), y, likely), jnp.where(weight > 0, log_r, -jnp.inf)


def _at_edge(model: Model, theta: Any, x: Any, y: jax.Array, log_w: jax.Array) -> jax.Array:
    """Whether an outcome that theta rules out is possible next to theta: then theta is at the edge of its set."""

    def look(_: None) -> jax.Array:
        near = []
        for sign in (1.0, -1.0):
            moved = jax.tree.map(lambda t: t + sign * 1e-5 * (1 + jnp.abs(t)), theta)  # noqa: B023
            beside = Conditional.of(model, moved, x, split=True).log_prob(y)
            near.append(jnp.where(jnp.isfinite(beside), beside, -jnp.inf))
        return jnp.any((log_w < -460) & (jnp.maximum(*near) > -230) & _fresh(log_w, y))

    rare = jnp.any(log_w < -460)
    if not is_traced(rare):
        return look(None) if rare else rare
    return jax.lax.cond(rare, look, lambda _: jnp.zeros((), bool), None)


def _fresh(log_w: jax.Array, y: jax.Array) -> jax.Array:
    """Padding repeats the last outcome of a row; an outcome of its own differs from the one before it."""
    fresh = jnp.concatenate([jnp.ones_like(y[:1], bool), y[1:] != y[:-1]])
    return fresh.reshape(*log_w.shape, -1).any(-1)


def _draw(model: Model, theta: Any, x: Any, index: jax.Array, law: MonteCarlo) -> jax.Array:
    """Draws [draws, n, *event], each row from its own key."""
    if x is None:
        return sample(call(model, theta, None), law.key, (law.draws,))[:, None]

    def row(xi: Any, i: jax.Array) -> jax.Array:
        one = jax.tree.map(lambda a: a[None], xi)
        return sample(call(model, theta, one), jax.random.fold_in(law.key, i), (law.draws,))[:, 0]

    return jnp.moveaxis(jax.vmap(row)(x, index), 0, 1)
