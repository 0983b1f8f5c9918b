"""Means over the rows of an array or of batches, with one batch in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from ..batches import Batches, pieces
from ..law import Law
from ..model import Model, is_traced, out_of_domain, require
from ..root import Root, make_root


def roots(model: Model, theta: Any, x: Any, law: Law) -> Iterator[Root]:
    """The root over each batch, each as a mean over its own rows."""
    for piece in pieces(x, law):
        yield make_root(model, theta, piece.x, law=piece.law, start=piece.start)


def mean_over_rows(model: Model, theta: Any, x: Any, law: Law, function: Callable[[Root], Any]) -> tuple[Any, Any]:
    """theta as it was checked, and the mean over all rows of `function(root)`, a tree of means over a root's rows."""
    total: Any = None
    count = 0
    for root in roots(model, theta, x, law):
        value, dtype = function(root), root.flat.dtype  # inputs of more digits do not change the type of theta's space
        if not isinstance(x, Batches):
            return root.theta, jax.tree.map(lambda leaf, to=dtype: leaf.astype(to), value)
        scaled = jax.tree.map(lambda leaf, n=root.n: n * leaf, value)
        total = scaled if total is None else jax.tree.map(jnp.add, total, scaled)
        count += root.n
    return root.theta, jax.tree.map(lambda leaf: (leaf / count).astype(dtype), total)


@jax.jit
def _finite(entries: tuple[jax.Array, ...]) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(part)) for part in entries]))


def unit(x: Any, *entries: jax.Array) -> jax.Array:
    """The scale 1 of an operator, or an error where `entries`, in which every row of R has a part, are not finite."""

    def message() -> str:
        where = "" if is_traced(x) or isinstance(x, Batches) or x is None else f" ({out_of_domain(x)})"
        return f"F is not finite: the model, or its derivative, is NaN or infinite at some row of x{where}"

    return require(_finite(entries), jnp.ones((), entries[0].dtype), message)
