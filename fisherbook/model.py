"""A statistical model: a callable from parameters (and inputs) to a distribution.

Everything that depends on how a distribution presents itself (numpyro, distrax, TensorFlow
Probability, a density of one's own) is adapted here and nowhere else.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import keystr, tree_flatten_with_path

from .compilation import APART, hide_constants, run
from .distributions import adapt, log_density

Model = Callable[..., Any]


class Itself:
    """A model that equals no other: what JAX keeps as static it compares and hashes, which arrays cannot be."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(self, *args: Any) -> Any:
        return self.model(*args)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Itself) and self.model is other.model

    def __hash__(self) -> int:
        return id(self.model)


def by_identity(model: Model) -> Model:
    """`model`, told from others by what it is, not by what it holds; a function is already."""
    kind: Any = type(model)
    if jax.tree_util.all_leaves([model]) and (kind.__eq__ is object.__eq__ or kind is MethodType):
        return model
    return model if isinstance(model, Itself) else Itself(model)


def is_traced(*trees: Any) -> bool:
    """Whether any leaf is abstract (inside `jit`, `vmap` or `grad`), so that its value cannot be read."""
    return any(isinstance(leaf, jax.core.Tracer) for tree in trees for leaf in jax.tree.leaves(tree))


def require(ok: Any, value: Any, message: str | Callable[[], str]) -> Any:
    """Return `value`, or raise `ValueError`: at once where `ok` is known, through `equinox.error_if` under jit."""
    if isinstance(ok, jax.core.Tracer):
        return require_all([(ok, message if isinstance(message, str) else message())], value)
    if not bool(ok):
        raise ValueError(message if isinstance(message, str) else message())
    return value


def require_all(checks: Iterable[tuple[Any, str]], value: Any) -> Any:
    """`require` for several checks at once, of which the first to fail is named; under jit they share one branch."""
    unknown = []
    for ok, message in checks:
        if isinstance(ok, jax.core.Tracer):
            unknown.append((ok, message))
        else:
            require(ok, value, message)
    apart = APART.get()
    if apart is not None:
        apart += [ok for ok, _ in unknown]
    if not unknown or apart is not None:
        return value
    import equinox  # only needed here, and a tenth of a second to import

    failed = ~jnp.stack([ok for ok, _ in unknown])
    value, messages = jax.tree.map(jnp.asarray, value), [message for _, message in unknown]
    return equinox.branched_error_if(value, jnp.any(failed), jnp.argmax(failed), messages)


def path_name(path: tuple[Any, ...]) -> str:
    return keystr(path, simple=True, separator=".") or "theta"


def parameter_names(theta: Any) -> list[str]:
    """Name the d scalars of `theta` in `ravel_pytree` order, the order of every matrix here.

    Args:
        theta: parameter pytree with d scalars.

    Returns:
        d strings.

    Example:
        >>> parameter_names({"beta": jnp.zeros(2), "sigma": 1.0})
        ['beta[0]', 'beta[1]', 'sigma']
    """
    names = []
    for path, leaf in tree_flatten_with_path(theta)[0]:
        name, shape = path_name(path), np.shape(leaf)
        names += [f"{name}[{','.join(map(str, i))}]" if shape else name for i in np.ndindex(*shape)]
    return names


def flatten(theta: Any, name: str = "theta", later: bool = False) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
    """Ravel a parameter pytree to [d], refusing what has no derivative or no value.

    With `later`, that it is finite under jit is for `checks.verdict` to see, together with all else.
    """
    leaves = tree_flatten_with_path(theta)[0]
    if sum(np.size(leaf) for _, leaf in leaves) == 0:
        raise ValueError(f"{name} is empty: it must hold at least one floating-point number")
    for path, leaf in leaves:
        dtype = np.asarray(leaf).dtype if not isinstance(leaf, jax.Array) else leaf.dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, but {path_name(path)} is {dtype}: write 1.0, not 1")
        if dtype == np.float64 and not isinstance(leaf, float) and not jax.config.jax_enable_x64:
            warnings.warn(
                f"{name} is float64 but JAX computes in float32: "
                'call jax.config.update("jax_enable_x64", True) before the first array',
                stacklevel=4,
            )
    flat, unravel = ravel_pytree(jax.tree.map(jnp.asarray, theta))
    if is_traced(flat):
        flat = hide_constants(flat)
        return flat if later else require(jnp.all(jnp.isfinite(flat)), flat, f"{name} is not finite"), unravel
    return require(np.isfinite(flat).all(), flat, lambda: f"{name} is not finite: {_culprits(theta)}"), unravel


def _culprits(theta: Any) -> str:
    values = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(theta)])
    return ", ".join(f"{n} = {v}" for n, v in zip(parameter_names(theta), values, strict=True) if not np.isfinite(v))


def row_count(x: Any, name: str = "x") -> int:
    """Length of the leading axis that all leaves of `x` share."""
    if getattr(x, "streamed", False):
        raise TypeError(
            f"{name} is Batches, which only laplace and the operators take, dense_fisher and the others: "
            "pass arrays, or one batch after the other"
        )
    leaves = tree_flatten_with_path(x)[0]
    if not leaves or any(np.ndim(leaf) == 0 for _, leaf in leaves):
        raise ValueError(f"{name} must hold arrays with a leading axis, one row per observation")
    lengths = {path_name(path): np.shape(leaf)[0] for path, leaf in leaves}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the arrays of {name} have different lengths: {lengths}")
    n = next(iter(lengths.values()))
    if n == 0:
        raise ValueError(f"{name} has no rows")
    explicit = lambda leaf: isinstance(leaf, jax.Array) and any(jax.typeof(leaf).sharding.spec)
    if any(explicit(leaf) for _, leaf in leaves):
        raise ValueError(
            f"{name} is sharded over a mesh with explicit axes, as jax.make_mesh makes them by default: make the mesh "
            "with axis_types=(jax.sharding.AxisType.Auto,) * len(axis_names)"
        )
    return int(n)


def take_rows(x: Any, rows: Any) -> Any:
    return jax.tree.map(lambda a: a[rows], x)


def not_finite(x: Any) -> str | None:
    """Where x holds NaN or infinity, in words, if it does and that is known."""
    for path, leaf in tree_flatten_with_path(x)[0]:
        known = not is_traced(leaf) and getattr(leaf, "is_fully_addressable", True)
        if known and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            bad = ~np.isfinite(np.asarray(leaf)).all(tuple(range(1, np.ndim(leaf))))
            if bad.any():
                return f"x{keystr(path)} is not finite at row {int(np.argmax(bad))}"
    return None


def out_of_domain(x: Any) -> str:
    """What a distribution without a law is to be blamed on."""
    return not_finite(x) or "theta is outside its domain"


def call(model: Model, theta: Any, x: Any) -> Any:
    """The distribution `model(theta)` or `model(theta, x)`, checked to be one."""
    try:
        distribution = model(theta) if x is None else model(theta, x)
    except ValueError as error:
        if "invalid" in str(error) and "parameter" in str(error):  # numpyro's own validation
            raise ValueError(f"{out_of_domain(x)}: {error}") from error
        raise
    if not callable(getattr(distribution, "log_prob", None)) or not hasattr(distribution, "batch_shape"):
        raise TypeError(
            f"model returned {type(distribution).__name__}, which is not a distribution: "
            "it needs log_prob, sample and batch_shape (numpyro.distributions have them; "
            "fisherbook.from_log_prob makes a model of a log-density of your own)"
        )
    return adapt(distribution)


def _base(distribution: Any) -> Any:
    """What `Independent` wraps: `base_dist` in numpyro, `distribution` in distrax and TFP."""
    while type(distribution).__name__ == "Independent":
        distribution = getattr(distribution, "base_dist", None) or distribution.distribution
    return distribution


@dataclass(frozen=True)
class Conditional:
    """p(y | x, theta) for a block of rows, seen coordinate by coordinate.

    `split` keeps the m independent coordinates of an `Independent` event apart ("sites"), so that
    their information can be added; otherwise a whole event is one site. An unconditional model is
    one row. Outcomes have shape [k, n, *sites, *event], log-probabilities [k, n, m].
    """

    distribution: Any
    rows: int
    conditional: bool
    sites: tuple[int, ...]

    @staticmethod
    def of(model: Model, theta: Any, x: Any, split: bool) -> Conditional:
        whole = call(model, theta, x)
        n = 1 if x is None else row_count(x)
        expected, batch = (() if x is None else (n,)), tuple(whole.batch_shape)
        if batch != expected:
            where = "model(theta)" if x is None else f"model(theta, x) for {n} rows of x"
            raise ValueError(
                f"{where} has batch_shape {batch}, but must have {expected}: one distribution per "
                "observation; declare several outputs per observation as an event with .to_event(1)"
            )
        inner = _base(whole) if split else whole
        return Conditional(inner, n, x is not None, tuple(inner.batch_shape)[len(expected) :])

    @property
    def batch(self) -> tuple[int, ...]:
        return ((self.rows,) if self.conditional else ()) + self.sites

    def log_prob(self, y: jax.Array) -> jax.Array:
        """log p(y) for y [k, n, *sites, *event], as [k, n, m]."""
        y = y if self.conditional else y[:, 0]
        value = log_density(self.distribution, y)
        if value.shape != (y.shape[0], *self.batch):
            raise ValueError(
                f"log_prob of {type(self.distribution).__name__} has shape {value.shape} for outcomes of shape "
                f"{y.shape}, but must give one number per observation: {(y.shape[0], *self.batch)}"
            )
        return value.reshape(y.shape[0], self.rows, -1)

    def of_observations(self, y: jax.Array) -> jax.Array:
        """log p(y) of n observations [n, *event], one number each: of the rows of x, or of repeats of one law."""
        return self.log_prob(y[None] if self.conditional else y[:, None]).ravel()

    def inside(self, y: jax.Array) -> jax.Array:
        """Whether y [k, n, *sites, *event] lies in the support, as [k, n, m]."""
        y = y if self.conditional else y[:, 0]
        support = getattr(self.distribution, "support", None)
        shape = (y.shape[0], *self.batch)
        if support is None or not callable(support):
            ok = jnp.ones(shape, bool)
        else:
            ok = jnp.broadcast_to(support(y), shape)
        return ok.reshape(y.shape[0], self.rows, -1)


def sample(distribution: Any, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws [*shape, *batch, *event]; TFP and distrax call the key `seed`."""
    try:
        return distribution.sample(key, sample_shape=shape)
    except TypeError:
        return distribution.sample(sample_shape=shape, seed=key)


def check_observations(model: Model, theta: Any, y: Any, x: Any, name: str = "y") -> jax.Array:
    """`y` as an array whose rows pair with `x` and lie in the model's support."""
    y = jnp.asarray(y)
    if y.ndim == 0 or y.shape[0] == 0:
        raise ValueError(f"{name} must have a leading axis with at least one observation, but has shape {y.shape}")
    if x is not None and row_count(x) != y.shape[0]:
        raise ValueError(f"x has {row_count(x)} rows but {name} has {y.shape[0]}")
    block = Conditional.of(model, theta, x, split=False)
    event = tuple(block.distribution.event_shape)
    if y.shape[1:] != event:
        raise ValueError(f"{name} has rows of shape {y.shape[1:]} but the model's events have shape {event}")

    def inside(theta: Any, y: jax.Array, x: Any) -> jax.Array:
        block, stacked = Conditional.of(model, theta, x, split=False), y[None] if x is not None else y[:, None]
        return block.inside(stacked) & (block.log_prob(stacked) > -jnp.inf)

    possible = run(inside, theta, y, x)
    if is_traced(possible):
        return require(jnp.all(possible), y, f"{name} has values outside the support of the model")
    possible = np.ravel(possible)
    if not possible.all():
        i = int(np.argmin(possible))
        support = getattr(block.distribution, "support", "its support")
        raise ValueError(f"{name}[{i}] = {np.asarray(y[i])} is impossible under the model: outside {support}")
    return y
