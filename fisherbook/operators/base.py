"""One contract for every structure of the Fisher information: products, solves, draws, and how it shows itself."""

from __future__ import annotations

import abc
from collections.abc import Callable
from html import escape
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from ..compilation import hide_constants, run
from ..model import is_traced, parameter_names, require


class Vector:
    """The form of a vector given by the user, kept for the answer: a pytree like theta, [d] or [d, k]."""

    def __init__(self, v: Any, theta: Any) -> None:
        d = sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(theta))
        dtype = jnp.result_type(*jax.tree.leaves(theta))  # a vector of another type is converted
        if is_like(v, theta):
            flat, unravel = ravel_pytree(v)
            self.matrix = _hidden(flat.astype(dtype))[:, None]
            self.back = lambda out: unravel(out[:, 0])
            return
        if not hasattr(v, "shape") or np.ndim(v) not in (1, 2) or np.shape(v)[0] != d:
            raise ValueError(
                f"a vector must be a pytree like theta, or an array [{d}] or [{d}, k]; got "
                f"{getattr(v, 'shape', None) or jax.tree.structure(v)}"
            )
        array = jnp.asarray(v)
        self.matrix = _hidden(array.astype(dtype)).reshape(d, -1)
        self.back = lambda out: out.reshape(array.shape)


def is_like(v: Any, theta: Any) -> bool:
    """Whether v is a pytree of theta's structure, with leaves of its shapes."""
    return jax.tree.structure(v) == jax.tree.structure(theta) and all(
        jnp.shape(a) == jnp.shape(b) for a, b in zip(jax.tree.leaves(v), jax.tree.leaves(theta), strict=True)
    )


def _hidden(v: jax.Array) -> jax.Array:
    return hide_constants(v) if is_traced(v) else v


def damping_vector(damping: Any, theta: Any) -> jax.Array:
    """Damping as a scalar, or as [d] from one number (or array) for each leaf of theta; never negative."""
    dtype = ravel_pytree(theta)[0].dtype
    if not jax.tree.leaves(damping):
        raise ValueError("damping must be a number or a pytree with one number per leaf of theta")
    if jax.tree.structure(damping) == jax.tree.structure(0.0) and jnp.ndim(damping) == 0:
        value = jnp.asarray(damping, dtype)
    elif jax.tree.structure(damping) == jax.tree.structure(theta):
        value = ravel_pytree(
            jax.tree.map(lambda a, t: jnp.broadcast_to(jnp.asarray(a, dtype), jnp.shape(t)), damping, theta)
        )[0]
    else:
        raise ValueError("damping must be a number or a pytree with one number per leaf of theta")
    ok = jnp.all((value >= 0) & jnp.isfinite(value))
    short = "damping must be finite and not negative"
    return require(ok, value, short if is_traced(ok) else f"{short}, got {damping}")


SHOWN = 2048  # parameters up to which the display of a matrix computes its eigenvalues
UNKNOWN = "not computed"


def condition(values: jax.Array, d: int) -> str:
    """The condition number of d eigenvalues, in words; those that are not in `values` are 0."""
    rank = int(jnp.sum(values > 8 * d * jnp.finfo(values.dtype).eps * jnp.max(values)))
    return f"{float(jnp.max(values) / jnp.min(values)):.3g}" if rank == d else f"singular: rank {rank} of {d}"


class Fisher(eqx.Module):
    """The Fisher information per observation, in one of five structures.

    `F @ v` takes a pytree like theta, a vector [d] or a matrix [d, k], and answers in the same form.
    """

    theta: Any
    scale: jax.Array
    law: str = eqx.field(static=True)

    @abc.abstractmethod
    def _multiply(self, V: jax.Array) -> jax.Array:
        """F V for V [d, k], without the scale."""

    @abc.abstractmethod
    def _solve(self, V: jax.Array, damping: jax.Array) -> jax.Array:
        """(F + damping)^-1 V for V [d, k], without the scale; damping is a scalar or [d]."""

    @abc.abstractmethod
    def _diagonal(self) -> jax.Array:
        """The diagonal [d] of F, without the scale."""

    @property
    def d(self) -> int:
        return sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(self.theta))

    @property
    def shape(self) -> tuple[int, int]:
        return self.d, self.d

    @property
    def dtype(self) -> Any:
        return jnp.result_type(*jax.tree.leaves(self.theta))

    @property
    def names(self) -> list[str]:
        return parameter_names(self.theta)

    def __matmul__(self, v: Any) -> Any:
        vector = Vector(v, self.theta)
        return vector.back(self._run(lambda F, V: F.scale * F._multiply(V), vector.matrix))

    def _run(self, function: Callable[..., Any], *args: jax.Array) -> Any:
        """`function` of this operator and the arrays, as one program."""
        return run(function, self, *args)

    def solve(self, v: Any, damping: Any = 0.0) -> Any:
        """Solve (F + damping I) w = v.

        Args:
            v: pytree like theta, [d] or [d, k].
            damping: a number, or a pytree with one number per leaf of theta; the unit of F.

        Returns:
            w in the form of v.

        Raises:
            ValueError: F + damping is singular, and the message names the null direction; v is not finite.
        """
        vector, damp = Vector(v, self.theta), damping_vector(damping, self.theta)
        V = require(jnp.all(jnp.isfinite(vector.matrix)), vector.matrix, "the right side v holds NaN or infinity")
        return vector.back(self._solve(V, damp / self.scale) / self.scale)

    def as_matrix(self) -> jax.Array:
        """The matrix [d, d]."""
        return self @ jnp.eye(self.d, dtype=self.dtype)

    def diagonal(self) -> jax.Array:
        """The diagonal [d]."""
        return run(lambda F: F.scale * F._diagonal(), self)

    def trace(self) -> jax.Array:
        """The trace, a scalar."""
        return jnp.sum(self.diagonal())

    def logdet(self, damping: Any = 0.0) -> jax.Array:
        """log det(F + damping I), a scalar; raises where that is singular."""
        damp = damping_vector(damping, self.theta)
        return self._logdet(damp / self.scale) + self.d * jnp.log(self.scale)

    def sample(self, key: jax.Array, shape: tuple[int, ...] = (), damping: Any = 0.0) -> jax.Array:
        """Draws, shape + (d,), from N(0, (F + damping I)^-1); divide by sqrt(n) for n observations."""
        damp = damping_vector(damping, self.theta)
        white = jax.random.normal(key, (self.d, int(np.prod(shape))), self.dtype)
        return (self._inverse_root(white, damp / self.scale) / jnp.sqrt(self.scale)).T.reshape(*shape, self.d)

    def inverse_diagonal(self, damping: Any = 0.0) -> jax.Array:
        """The diagonal [d] of (F + damping I)^-1: variances, n times too large for n observations."""
        damp = damping_vector(damping, self.theta)
        return self._inverse_diagonal(damp / self.scale) / self.scale

    def _inverse_diagonal(self, damping: jax.Array) -> jax.Array:
        squared = lambda F, damping: jnp.sum(F._inverse_root(jnp.eye(F.d, dtype=F.dtype), damping) ** 2, 1)
        return run(squared, self, damping)

    @abc.abstractmethod
    def _logdet(self, damping: jax.Array) -> jax.Array: ...

    @abc.abstractmethod
    def _inverse_root(self, white: jax.Array, damping: jax.Array) -> jax.Array:
        """A root of (F + damping)^-1 times white noise [d, k], without the scale."""

    def __mul__(self, c: Any) -> Fisher:
        if jnp.ndim(c) != 0:
            raise TypeError(f"an operator is multiplied by a number, not by an array of shape {jnp.shape(c)}")
        if not is_traced(c) and not float(c) > 0:
            raise ValueError(f"an information is multiplied by a positive number, got {c}")
        return eqx.tree_at(lambda F: F.scale, self, self.scale * c)

    __rmul__ = __mul__

    def __add__(self, other: Any) -> Fisher:
        from .total import Sum

        if not isinstance(other, Fisher):
            return NotImplemented
        if jax.tree.structure(other.theta) != jax.tree.structure(self.theta) or other.d != self.d:
            raise ValueError(
                f"cannot add operators of parameters of {self.d} and {other.d} scalars or of other structure"
            )
        return self._plus(other) or Sum(self.theta, jnp.ones((), self.dtype), self.law, (self, other))

    def _plus(self, other: Fisher) -> Fisher | None:
        """The sum in this structure, where it stays one."""
        return None

    def average(self, newer: Fisher, weight: Any) -> Fisher:
        """(1 - weight) of this operator and weight of a newer one, in this structure; raises where that is none."""
        raise ValueError(
            f"{type(self).__name__} cannot be averaged: use dense_fisher, diagonal_fisher or kronecker_fisher"
        )

    def as_lineax(self) -> Any:
        """A `lineax.FunctionLinearOperator` on vectors [d], positive semi-definite."""
        import lineax

        form = jax.ShapeDtypeStruct((self.d,), self.dtype)
        return lineax.FunctionLinearOperator(self.__matmul__, form, lineax.positive_semidefinite_tag)

    def _facts(self) -> list[tuple[str, str]]:
        """Rows of the notebook display."""
        rows = [("structure", type(self).__name__), ("size", f"{self.d} x {self.d}"), ("law", self.law)]
        if not is_traced(self.scale):
            rows += self._numbers()
        return rows

    def _numbers(self) -> list[tuple[str, str]]:
        return [("trace", f"{float(self.trace()):.4g}"), ("condition", self._condition())]

    def _condition(self) -> str:
        """The condition number, in words, where it costs no more than a solve; a sum and a product do not know it."""
        return UNKNOWN

    def __repr__(self) -> str:
        return f"{type(self).__name__}(d={self.d}, law={self.law})"

    def _repr_html_(self) -> str:
        cells = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in self._facts())
        return f"<table>{cells}</table>"
