"""Sums over inputs, a block of rows at a time, so that no more is held than a block needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..root import CAP, Root

BLOCK = 2**21  # scalars for one block of inputs: few enough to stay near the processor


def over_blocks(root: Root, function: Callable[[Root], Any], scalars: int, sums: int = 0) -> Any:
    """Sum `function` over blocks of rows such that a block of them holds about `BLOCK` of the `scalars` that all need.

    Where the result has many entries, `sums`, a block holds two thirds as many, so that adding up costs little. With
    several devices it holds about `CAP` on each, and takes as many rows from each: the data stay where they are.
    """
    devices = jax.device_count()
    held = min(max(BLOCK, 2 * sums // 3), CAP) if devices == 1 else CAP * devices
    count = min(root.n, -(-scalars // held))
    if count <= 1:
        return function(root)
    shares = devices if root.n % devices == 0 else 1
    n = root.n // shares
    length = -(-n // count)
    starts = np.minimum(np.arange(0, n, length), n - length)
    skip = np.arange(0, n, length) - starts  # the last block overlaps the one before: those rows weigh nothing

    def cut(a: Any, start: jax.Array) -> jax.Array:
        a = jnp.asarray(a).reshape(shares, n, *jnp.shape(a)[1:])
        return jax.lax.dynamic_slice_in_dim(a, start, length, 1).reshape(shares * length, *a.shape[2:])

    def block(at: jax.Array) -> Any:
        start, overlap = at
        rows, new = jax.tree.map(lambda a: cut(a, start), root.rows), np.tile(np.arange(length), shares) >= overlap
        return function(replace(root, rows=rows._replace(weight=rows.weight * new)))

    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(block, (0, 0)))
    add = lambda total, at: (jax.tree.map(jnp.add, total, block(at)), None)
    return jax.lax.scan(add, zero, (jnp.asarray(starts), jnp.asarray(skip)))[0]
