"""Means over the rows of an array or of batches, with one batch in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from ..batches import Batches, pieces
from ..law import Law
from ..model import Model
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
        value = function(root)
        if not isinstance(x, Batches):
            return root.theta, value
        scaled = jax.tree.map(lambda leaf, n=root.n: n * leaf, value)
        total = scaled if total is None else jax.tree.map(jnp.add, total, scaled)
        count += root.n
    return root.theta, jax.tree.map(lambda leaf: leaf / count, total)
