"""Inputs that are read a batch at a time, as often as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax

from .law import Data, Law
from .model import row_count, take_rows


class Batches:
    """Inputs in batches, wherever an operator takes `x`: the answer is that of the whole array, the memory a batch's.

    Draws are keyed by the number of the row, so that the size of the batches does not change them. Observations come
    as `law=Data(y)`, with y an array of all of them or `Batches` too. Batches of one shape share a compiled program.

    Args:
        source: what can be iterated again: a list, a data loader, or a function that returns a fresh iterator. Each
            item is an x with leading axis n.
        pick: takes x from an item, such as `lambda item: item[0]` for a loader of pairs.

    Raises:
        ValueError: the source can be iterated once only (a generator), or holds nothing.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> from fisherbook import dense_fisher
        >>> x = jnp.arange(12.0).reshape(6, 2)
        >>> model = lambda t, x: dist.Poisson(jnp.exp(x @ t))
        >>> F = dense_fisher(model, jnp.zeros(2), Batches([x[:4], x[4:]]))
        >>> print(abs(F.as_matrix() - x.T @ x / 6).max() < 1e-12)
        True

    Derived in the chapter "Fisher at scale". Source: the mean over inputs in Martens (2020), section 5.
    """

    streamed = True  # what takes no batches says so

    def __init__(self, source: Iterable[Any] | Callable[[], Iterator[Any]], pick: Callable[[Any], Any] | None = None):
        if not callable(source) and iter(source) is source:
            raise ValueError(
                f"Batches are read more than once, but a {type(source).__name__} can be iterated once only: pass a "
                "list, or a function that returns a fresh iterator"
            )
        self.source, self.pick = source, pick

    def __iter__(self) -> Iterator[Any]:
        items = self.source() if callable(self.source) else self.source
        for item in items:
            yield item if self.pick is None else self.pick(item)


class Piece(NamedTuple):
    x: Any
    law: Law
    start: int  # number of its first row


def pieces(x: Any, law: Law) -> Iterator[Piece]:
    """The batches of x with their laws; of an array, or without inputs, the one piece that it is."""
    if not isinstance(x, Batches):
        yield Piece(x, law, 0)
        return
    first: Any = None
    start, ys = 0, iter(law.y) if isinstance(law, Data) and isinstance(law.y, Batches) else None
    for k, batch in enumerate(x):
        structure = jax.tree.structure(batch)
        if k and structure != first:
            raise ValueError(f"batch {k} of x has another structure than the first: {structure}, not {first}")
        first, n = structure, row_count(batch)
        yield Piece(batch, _law_of(law, ys, start, n), start)
        start += n
    if start == 0:
        raise ValueError("Batches hold no inputs; a function that is passed must return a fresh iterator each time")
    if isinstance(law, Data):
        left = next(ys, None) is not None if ys is not None else row_count(law.y, "y") > start
        if left:
            raise ValueError(f"x has {start} rows in all its batches, but y has more")


def _law_of(law: Law, ys: Iterator[Any] | None, start: int, n: int) -> Law:
    if not isinstance(law, Data):
        return law
    if ys is None:
        return Data(take_rows(law.y, slice(start, start + n)))
    y = next(ys, None)
    if y is None:
        raise ValueError(f"y has fewer batches than x: none for the rows from {start} on")
    return Data(y)
