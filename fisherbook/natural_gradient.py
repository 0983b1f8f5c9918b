"""The natural gradient as an optax transformation: steepest descent in the metric of the Fisher information."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from .batches import Batches
from .law import Data, Exact, Law, MonteCarlo
from .levenberg_marquardt import LevenbergMarquardt, adapt
from .model import Model, is_traced, path_name, require
from .operators import dense_fisher, implicit_fisher

Number = Any  # a number, or a schedule: a function of the step count


class NaturalGradientState(NamedTuple):
    """What a run needs to go on: arrays that NumPy can save, random keys among them as integers."""

    count: jax.Array  # steps so far
    damping: jax.Array  # of the next step, where it adapts
    momentum: Any  # running direction, like params; () without momentum
    curvature: Any  # the operator in use; () where every step makes its own
    kl: jax.Array  # 1/2 d^T F d of the last step: the divergence it moved, to second order
    reduction: jax.Array  # actual over predicted decrease of the last step; nan where damping does not adapt
    rejected: jax.Array  # steps that were not taken because they would have increased the loss


def natural_gradient(
    model: Model,
    learning_rate: Number = 1.0,
    *,
    curvature: Callable[..., Any] = dense_fisher,
    law: Any = Exact(),  # noqa: B008
    damping: Any = 1e-3,
    trust_radius: float | None = None,
    momentum: float = 0.0,
    every: int = 1,
    averaging: float = 0.0,
    example: Any = None,
) -> Any:
    r"""Precondition gradients with the inverse Fisher information, :math:`-\eta (F + \lambda I)^{-1} g`.

    Gradients must be those of the *mean* negative log-likelihood, since F is per observation. With the gradient of a
    sum over n observations the step is n times too long: the symptom is a loss that rises at a learning rate of 1.

    The step is `update(grads, state, params, x=x, y=y, key=key, value_fn=f)`: x are the inputs of the batch (absent
    for an unconditional model), y its observations where `law=Data`, key where the law is a function of it, and
    `value_fn(params)` the loss of the batch where damping adapts.

    The updates carry the sign of descent and are added as they are, so in `optax.chain` a weight decay w that is part
    of the loss, `optax.add_decayed_weights(w)`, comes before this transformation, and decoupled decay behind it with a
    minus, `optax.add_decayed_weights(-learning_rate * w)`.

    Args:
        model: `model(theta)` or `model(theta, x)`, a distribution.
        learning_rate: a number or a schedule; 1 is the full natural-gradient step.
        curvature: `dense_fisher`, `diagonal_fisher`, `kronecker_fisher`, `low_rank_fisher`, `implicit_fisher`, or any
            function of their signature that returns an operator with `shape`, `solve` and `@`; one that the state holds
            is a pytree, and has `average(newer, weight)` where `averaging` is above 0. With `dense_fisher` and fewer
            rows than parameters F is not formed: the same step is computed in the space of the rows, or, above 8192
            rows, by conjugate gradients to a relative residual of 1e-8.
        law: a law; a function from the step's key to one, `lambda key: MonteCarlo(key, 1)`; or `Data` itself, for the
            empirical Fisher of each batch.
        damping: a number, a schedule, a pytree with one number per leaf, or `LevenbergMarquardt(...)`; the unit of F.
        trust_radius: the largest divergence :math:`\frac12 d^\top F d` that a step may cover, in nats per observation;
            longer steps are shortened.
        momentum: fraction of the last direction that is added to the new one, in [0, 1).
        every: steps between two computations of the curvature.
        averaging: weight of the past in a running mean of the curvature, in [0, 1).
        example: inputs of one batch (or a row of them); needed where the state holds the curvature (`every` above 1 or
            `averaging` above 0), since `init` sees the parameters alone.

    Returns:
        An `optax.GradientTransformationExtraArgs`; its state is a `NaturalGradientState`.

    Raises:
        ValueError: an argument that an option needs is missing, the curvature's size is not that of the parameters, F +
            damping is singular, or the gradient is not finite.

    Example:
        >>> import numpyro.distributions as dist, optax
        >>> model, y = (lambda t: dist.Poisson(jnp.exp(t))), jnp.array([2, 5, 3, 6])
        >>> loss = lambda t: -model(t).log_prob(y).mean()
        >>> optimiser, t = natural_gradient(model, damping=0.0), jnp.array(1.0)
        >>> state = optimiser.init(t)
        >>> for _ in range(6):
        ...     updates, state = optimiser.update(jax.grad(loss)(t), state, t)
        ...     t = optax.apply_updates(t, updates)
        >>> print(f"{jnp.exp(t):.6f}")  # the mean
        4.000000

    Derived in the chapter "The natural gradient". Source: Amari (1998), section 2; Martens (2020), sections 6 and 8.
    """
    import optax

    adaptive = isinstance(damping, LevenbergMarquardt)
    holds = every > 1 or averaging > 0
    _check_options(learning_rate, trust_radius, momentum, every, averaging)

    def build(params: Any, x: Any, y: Any, key: Any) -> Any:
        F = _pick(curvature, holds)(model, params, x, law=_law_of_step(law, y, key))
        d = ravel_pytree(params)[0].size
        if tuple(getattr(F, "shape", ())) != (d, d):
            raise ValueError(f"curvature has shape {getattr(F, 'shape', None)} but the parameters are {d} scalars")
        return _storable(F, averaging) if holds else F

    def init(params: Any) -> NaturalGradientState:
        dtype = ravel_pytree(params)[0].dtype
        zero = jnp.zeros((), dtype)
        held: Any = ()
        if holds:
            y = None if law is not Data else _outcomes_like(model, params, example)
            if example is None and len(inspect.signature(model).parameters) > 1:
                raise ValueError("the state holds the curvature: pass example=, the inputs of one batch")
            shapes = jax.eval_shape(lambda p: build(p, example, y, jax.random.key(0)), params)
            held = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        running = jax.tree.map(jnp.zeros_like, params) if momentum > 0 else ()
        start = jnp.asarray(damping.initial if adaptive else 0.0, dtype)
        count = jnp.zeros((), int)
        return NaturalGradientState(count, start, running, held, zero, jnp.full((), jnp.nan, dtype), count)

    def refresh(state: NaturalGradientState, params: Any, x: Any, y: Any, key: Any) -> Any:
        if not holds:
            return build(params, x, y, key)

        def renew(old: Any) -> Any:
            new = build(params, x, y, key)
            if _form(new) != _form(old):
                hint = "its form depends on the number of rows, so example= must have as many as the batches"
                raise ValueError(f"{type(new).__name__} of this batch does not fit that of example=: {hint}")
            return new if averaging == 0 else old.average(new, jnp.where(state.count == 0, 1.0, 1 - averaging))

        return jax.lax.cond(state.count % every == 0, renew, lambda old: old, state.curvature)

    def update(
        updates: Any,
        state: NaturalGradientState,
        params: Any = None,
        *,
        x: Any = None,
        y: Any = None,
        key: Any = None,
        value_fn: Callable[[Any], Any] | None = None,
        **extra: Any,
    ) -> tuple[Any, NaturalGradientState]:
        del extra
        if params is None:
            raise ValueError("natural_gradient needs the parameters: update(grads, state, params, x=x)")
        if adaptive and value_fn is None:
            raise ValueError("LevenbergMarquardt compares losses: pass value_fn=, a function of params, to update")
        grads = _finite(_like(updates, params))
        F = refresh(state, params, x, y, key)
        level = state.damping if adaptive else _level(damping, params, state.count)
        direction = F.solve(grads, level)
        if momentum > 0:
            direction = jax.tree.map(lambda m, v: momentum * m + v, state.momentum, direction)
        step = _scaled(direction, -_at(learning_rate, state.count))
        curve = _dot(step, F @ step)
        if trust_radius is not None:
            shorten = jnp.minimum(1.0, jnp.sqrt(2 * trust_radius / jnp.maximum(curve, jnp.finfo(curve.dtype).tiny)))
            step, curve = _scaled(step, shorten), curve * shorten**2
        new = state._replace(
            count=state.count + 1,
            kl=curve / 2,
            momentum=direction if momentum > 0 else (),
            curvature=F if holds else (),
        )
        if adaptive:
            assert value_fn is not None
            step, new = adapt(damping, new, step, value_fn, params, _dot(grads, step) + curve / 2)
        return step, new

    return optax.GradientTransformationExtraArgs(init, update)


def _check_options(learning_rate: Any, trust_radius: Any, momentum: float, every: int, averaging: float) -> None:
    if not callable(learning_rate) and not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate must be positive or a schedule, got {learning_rate}")
    if trust_radius is not None and not trust_radius > 0:
        raise ValueError(f"trust_radius must be positive, a divergence in nats, got {trust_radius}")
    if not 0 <= momentum < 1 or not 0 <= averaging < 1:
        raise ValueError(f"momentum and averaging must be in [0, 1), got {momentum} and {averaging}")
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")


def _law_of_step(law: Any, y: Any, key: Any) -> Law:
    if law is Data:
        if y is None:
            raise ValueError("law=Data needs the observations of the batch: update(..., y=y)")
        return Data(y)
    if isinstance(law, (Exact, MonteCarlo, Data)):
        return law
    if key is None:
        raise ValueError("a sampled law needs the step's key: update(..., key=key)")
    return law(key)


def _pick(curvature: Callable[..., Any], holds: bool) -> Callable[..., Any]:
    """Row space instead of a matrix where there are fewer rows than parameters: the same step, sooner."""
    if curvature is not dense_fisher or holds:
        return curvature

    def choose(model: Model, theta: Any, x: Any, *, law: Law) -> Any:
        rows: list[int] = []

        def count(theta: Any) -> None:
            F = implicit_fisher(model, theta, x, law=law)
            rows.append(F.rows - F.d)

        if not isinstance(x, Batches):
            jax.eval_shape(count, theta)  # traced only: nothing of it is compiled
        return (implicit_fisher if rows and rows[0] < 0 else dense_fisher)(model, theta, x, law=law)

    return choose


def _storable(F: Any, averaging: float) -> Any:
    """The operator for the state, with its random keys as the integers that NumPy can save."""
    name = type(F).__name__
    if jax.tree_util.treedef_is_leaf(jax.tree.structure(F)):
        raise TypeError(
            f"the state holds the curvature (every above 1, or averaging), so {name} must be a pytree: make it an "
            "equinox.Module, or register it with jax.tree_util"
        )
    if averaging > 0 and not callable(getattr(F, "average", None)):
        raise TypeError(f"{name} has no average(newer, weight), which averaging needs: write it, or pass averaging=0.0")
    default = jax.random.key_impl(jax.random.key(0))

    def raw(leaf: Any) -> Any:  # two integers are read as a key of the default kind, any others are not
        if not jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key) or jax.random.key_impl(leaf) != default:
            return leaf
        data = jax.random.key_data(leaf)
        return data if data.shape == (2,) else leaf

    return jax.tree.map(raw, F)


def _outcomes_like(model: Model, params: Any, x: Any) -> Any:
    whole = model(params) if x is None else model(params, x)
    return whole.sample(jax.random.key(0), (1,) if x is None else ())


def _like(grads: Any, params: Any) -> Any:
    """The gradients, if they have the form of the parameters."""
    if _form(grads) != _form(params):
        raise ValueError(f"gradients have the shapes {_form(grads)[1]}, parameters {_form(params)[1]}")
    return grads


def _form(tree: Any) -> tuple[Any, list[tuple[int, ...]]]:
    return jax.tree.structure(tree), [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]


def _finite(grads: Any) -> Any:
    ok = jnp.all(jnp.isfinite(ravel_pytree(grads)[0]))

    def message() -> str:
        leaves = jax.tree_util.tree_leaves_with_path(grads)
        bad = [] if is_traced(ok) else [path_name(p) for p, g in leaves if not bool(jnp.all(jnp.isfinite(g)))]
        return "the gradient is not finite" + (f" in {', '.join(bad)}" if bad else "")

    return require(ok, grads, message)


def _at(value: Any, count: jax.Array) -> Any:
    return value(count) if callable(value) else value


def _level(damping: Any, params: Any, count: jax.Array) -> Any:
    """Damping of this step; one per leaf has the type of the parameters, which may be callable (an equinox module)."""
    return damping if isinstance(damping, type(params)) else _at(damping, count)


def _scaled(tree: Any, c: Any) -> Any:
    return jax.tree.map(lambda leaf: (c * leaf).astype(leaf.dtype), tree)


def _dot(a: Any, b: Any) -> jax.Array:
    return jnp.vdot(ravel_pytree(a)[0], ravel_pytree(b)[0])
