"""The law an expectation is under: exact, sampled, or the data. Never a mode string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .model import Conditional, Model, is_traced, take_rows
from .quadrature import LEVELS, bounds, count_window

TRACED_COUNTS = 1024  # outcomes of a countable support where values cannot be read


@dataclass(frozen=True)
class Exact:
    """The model itself, summed or integrated: exact to rounding, or an error; never a sample.

    Finite supports are enumerated, countable ones until the tail is negligible, scalar continuous ones
    integrated by double-exponential quadrature, multivariate normals up to dimension 3 by a tensor rule.
    `Independent` events are added coordinate by coordinate.

    Args:
        max_outcomes: the most outcomes per coordinate before it gives up.
        outcomes: the number of outcomes of a countable support, or of a finite one whose size cannot
            be read under `jit`. Found where values can be read; 1024 consecutive counts under `jit`.
        around: centre (or centres) of the quadrature instead of the distribution's own.
        breakpoints: points where the density has a kink, a jump or a peak of its own.

    Example:
        >>> Exact(breakpoints=(-1.0, 1.0)).breakpoints
        (-1.0, 1.0)
    """

    max_outcomes: int = 2**20
    outcomes: int | None = None
    around: Any = None
    breakpoints: Sequence[Any] = field(default=())

    def __post_init__(self) -> None:
        if self.max_outcomes < 2 or (self.outcomes is not None and self.outcomes < 1):
            raise ValueError(f"Exact needs max_outcomes >= 2 and outcomes >= 1, got {self}")


@dataclass(frozen=True)
class MonteCarlo:
    """The model itself, sampled: `draws` outcomes per input, each row with a key of its own.

    Errors are O(1/sqrt(draws)). Draws are keyed by row, so that batching does not change an answer.

    Args:
        key: a `jax.random.key`.
        draws: outcomes per row of x (or in all, for an unconditional model), at least 1.

    Raises:
        ValueError: no draws. TypeError: `key` is not a JAX random key.

    Example:
        >>> MonteCarlo(jax.random.key(0), 100).draws
        100
    """

    key: Any
    draws: int

    def __post_init__(self) -> None:
        if isinstance(self.draws, (int, np.integer)) and self.draws < 1:
            raise ValueError(f"MonteCarlo needs draws >= 1, got {self.draws}")
        key, dtype = self.key, getattr(self.key, "dtype", None)
        if isinstance(key, (jax.Array, np.ndarray)):
            typed = jnp.issubdtype(dtype, jax.dtypes.prng_key)
            if typed or (dtype == np.uint32 and key.shape == (2,)):
                return
        elif dtype is not None or type(key) is object:
            return  # a placeholder of a JAX transformation
        raise TypeError(f"MonteCarlo needs a key, as in MonteCarlo(jax.random.key(0), 1000); got {key!r}")


@dataclass(frozen=True)
class Data:
    """The observations `y`, paired with the rows of x: what gives the *empirical* Fisher, never the Fisher.

    Args:
        y: observations with leading axis n.
    """

    y: Any


Law = Exact | MonteCarlo | Data
jax.tree_util.register_dataclass(Exact, ["around", "breakpoints"], ["max_outcomes", "outcomes"])
jax.tree_util.register_dataclass(MonteCarlo, ["key"], ["draws"])
jax.tree_util.register_dataclass(Data, ["y"], [])


class Plan(NamedTuple):
    """What is static about the outcomes: how they are made and how many per site."""

    kind: str  # data, draws, table, integers, counts, line, normal
    size: int = 0
    level: int = 0

    @property
    def enumerated(self) -> bool:
        return self.kind in ("table", "integers")

    @property
    def exact(self) -> bool:
        return self.kind not in ("data", "draws")

    def finer(self, limit: int) -> Plan | None:
        if self.kind == "line" and self.level < LEVELS and 2 * self.size <= limit:
            return self._replace(level=self.level + 1, size=2 * self.size)
        if self.kind == "normal" and self.level < 2 and self.size * 8 <= limit:
            return self._replace(level=self.level + 1, size=self.size * 8)
        return None


def check_law(law: Any) -> None:
    if not isinstance(law, (Exact, MonteCarlo, Data)):
        raise TypeError(f"law must be Exact(), MonteCarlo(key, draws) or Data(y), got {law!r}")


def refuse_data(law: Law, name: str) -> None:
    """Hellinger and KL compare distributions; averaging them over labels would answer another question."""
    check_law(law)
    if isinstance(law, Data):
        raise ValueError(
            f"{name} compares distributions, so law=Data(y) does not define it: use Exact() or MonteCarlo(key, draws); "
            "for the average over observed labels (the empirical Fisher) call score_covariance(..., law=Data(y))"
        )


def make_plan(model: Model, thetas: Sequence[Any], x: Any, law: Law) -> Plan:
    """How the outcomes are to be made, from the first row (and all rows where their number depends on it)."""
    if isinstance(law, Data):
        return Plan("data", 1 if x is not None else len(law.y))
    if isinstance(law, MonteCarlo):
        return Plan("draws", law.draws)
    first = None if x is None else take_rows(x, slice(0, 1))
    with jax.ensure_compile_time_eval():  # a fixed number of trials stays a number under jit
        d = Conditional.of(model, thetas[0], first, split=True).distribution
        event, support = tuple(d.event_shape), getattr(d, "support", None)
        if getattr(d, "outcomes", None) is not None:
            return Plan("table", len(d.outcomes))
        if event and getattr(d, "covariance_matrix", None) is not None and event[0] <= 3:
            return Plan("normal", 65 ** event[0])
        if event or support is None or not hasattr(support, "is_discrete"):
            raise _cannot(d, f"its outcomes have shape {event}" if event else "it does not say what its support is")
        if not support.is_discrete:
            return Plan("line", 700)
        if bounds(support)[1] is None and not is_boolean(support):
            if bounds(support)[0] is None:
                raise _cannot(d, f"its support is {support}")
            return Plan("counts", _count_outcomes(model, thetas, x, law))
        return Plan("integers", _integer_outcomes(model, thetas[0], x, law, support))


def is_boolean(support: Any) -> bool:
    return type(support).__name__.lstrip("_") == "Boolean"


def _cannot(distribution: Any, reason: str) -> ValueError:
    return ValueError(
        f"law=Exact() cannot be exact for {type(distribution).__name__}: {reason}. "
        "Pass law=MonteCarlo(key, draws) to sample it, give its outcomes with from_log_prob(..., support=outcomes), "
        "or take an operator, such as dense_fisher, which knows closed forms"
    )


def _integer_outcomes(model: Model, theta: Any, x: Any, law: Exact, support: Any) -> int:
    if is_boolean(support):
        return 2
    if not all(isinstance(b, int) for b in bounds(support)) and x is not None:
        support = Conditional.of(model, theta, x, split=True).distribution.support
    lower, upper = bounds(support)
    if is_traced(lower, upper):
        if law.outcomes is None:
            raise ValueError(
                "the number of outcomes depends on traced values: under jit pass law=Exact(outcomes=largest number + 1)"
            )
        return law.outcomes
    size = int(np.max(np.asarray(upper) - np.asarray(lower))) + 1
    if size > law.max_outcomes:
        raise ValueError(f"the support has {size} outcomes, more than Exact(max_outcomes={law.max_outcomes})")
    return size


def _count_outcomes(model: Model, thetas: Sequence[Any], x: Any, law: Exact) -> int:
    """The window of counts outside which every density is below exp(-75) times its largest value."""
    if law.outcomes is not None or is_traced(thetas, x):
        return law.outcomes or min(TRACED_COUNTS, law.max_outcomes)
    blocks = [Conditional.of(model, theta, x, split=True) for theta in thetas]
    size = 64
    while size <= law.max_outcomes:
        window = count_window([b.distribution for b in blocks], size)
        ends = jnp.stack([window[0], window[size // 2], window[-1]])
        done = True
        for b in blocks:
            y = ends if b.conditional else ends[:, None]
            log_p = np.where(np.asarray(b.inside(y)), np.asarray(b.log_prob(y)), -np.inf)
            lowest = np.asarray(bounds(b.distribution.support)[0])
            at_start = np.broadcast_to(np.asarray(window[0]) <= lowest, window.shape[1:]).reshape(log_p.shape[1:])
            peak = log_p.max(0)
            done &= bool(np.all(((log_p[0] < peak - 75) | at_start) & (log_p[2] < peak - 75)))
        if done:
            return min(size, law.max_outcomes)
        size *= 2
    raise ValueError(
        f"the tail is not negligible after {law.max_outcomes} outcomes: pass law=Exact(max_outcomes=...) to sum more, "
        "or law=MonteCarlo(key, draws)"
    )
