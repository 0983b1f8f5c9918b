"""Means over the rows of an array or of batches, with one batch in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..batches import Batches, Piece, pieces
from ..compilation import traced_once
from ..expectation import Rows
from ..law import Data, Law
from ..model import Model, is_traced, out_of_domain, require
from ..root import Root, make_root


class Passes:
    """What the passes over one operator's batches share: programs, and what the first pass settled for each batch."""

    def __init__(self) -> None:
        self.programs: dict[Any, Any] = {}
        self.settled: dict[int, tuple[Any, Root]] = {}

    def keep(self, k: int, piece: Piece, root: Root) -> None:
        self.settled[k] = _form(piece), replace(root, rows=Rows(None, None, (), ()))  # its data are read again

    def again(self, k: int, piece: Piece, theta: Any) -> Root | None:
        """The root over batch k, where an earlier pass has checked inputs of this form."""
        form, root = self.settled.get(k, (None, None))
        if root is None or form != _form(piece):
            return None
        y, law = (jnp.asarray(piece.law.y), root.law) if isinstance(piece.law, Data) else (None, piece.law)
        rows = Rows(piece.x, y, np.arange(piece.start, piece.start + root.total), np.ones(root.total))
        return replace(root, theta=theta, law=law, rows=rows)


def _form(piece: Piece) -> Any:
    data = piece.x, piece.law.y if isinstance(piece.law, Data) else None
    leaves, structure = jax.tree.flatten(data)
    return structure, piece.start, [(np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]


def roots(model: Model, theta: Any, x: Any, law: Law, passes: Passes) -> Iterator[Root]:
    """The root over each batch, each as a mean over its own rows."""
    for k, piece in enumerate(pieces(x, law)):
        root = passes.again(k, piece, theta)
        if root is None:
            with traced_once(passes.programs):
                root = make_root(model, theta, piece.x, law=piece.law, start=piece.start)
            if isinstance(x, Batches):
                passes.keep(k, piece, root)
        yield root


def mean_over_rows(
    model: Model, theta: Any, x: Any, law: Law, function: Callable[[Root], Any], passes: Passes | None = None
) -> tuple[Any, Any]:
    """theta as it was checked, and the mean over all rows of `function(root)`, a tree of means over a root's rows.

    `passes` is of an operator that reads its batches several times.
    """
    passes = passes or Passes()
    if not isinstance(x, Batches):
        (root,) = roots(model, theta, x, law, passes)
        return root.theta, jax.tree.map(lambda leaf: leaf.astype(root.flat.dtype), function(root))
    total: Any = None
    count = 0
    for root in roots(model, theta, x, law, passes):
        with traced_once(passes.programs):
            value = function(root)
        scaled = jax.tree.map(lambda leaf, n=root.n: n * leaf, value)
        if not is_traced(scaled):  # else Python would run ahead, and hold the batches that wait
            jax.block_until_ready(scaled)
        total = scaled if total is None else jax.tree.map(jnp.add, total, scaled)
        count += root.n
    dtype = root.flat.dtype  # inputs of more digits do not change the type of theta's space
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
