"""R^T R by its tiles on and above the diagonal: XLA does not use the symmetry and would compute both halves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

STEP = 16  # edges lie at multiples of it, so that products of tiles fill a processor's registers


def cut(d: int, pieces: int) -> list[slice]:
    """`pieces` ranges of d columns, about equal, with edges at multiples of STEP where d is that large."""
    edges = [min(d, -(-d * i // (pieces * STEP)) * STEP) for i in range(pieces)]
    return [slice(*pair) for pair in itertools.pairwise([*edges, d])]


def upper(parts: Sequence[slice], tile: Callable[[slice, slice], jax.Array]) -> list[jax.Array]:
    """The tiles on and above the diagonal, row by row."""
    return [tile(i, j) for k, i in enumerate(parts) for j in parts[k:]]


def assemble(tiles: Sequence[jax.Array], pieces: int) -> jax.Array:
    """The symmetric matrix whose tiles `upper` made."""
    left = iter(tiles)
    rows: list[list[jax.Array]] = [[] for _ in range(pieces)]
    for k in range(pieces):
        for m in range(k, pieces):
            tile = next(left)
            rows[m].append(tile.T if m > k else (tile + tile.T) / 2)
            if m > k:
                rows[k].append(tile)
    return jnp.block(rows)
