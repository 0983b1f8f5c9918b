"""Covariances J C J^T of linearised outputs, with the Jacobian J as activations and backward signals of the layers.

The rows of J are those of the root of a normal law whose means are the outputs and whose scale is 1, so what finds
the layers of the Fisher information finds them here. No row of J is written out for a diagonal or a Kronecker C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from ..compilation import run
from ..expectation import Rows
from ..law import Exact, Plan
from ..layers import Layers
from ..model import row_count
from ..operators import layered
from ..operators.blocks import Block
from ..operators.diagonal import DiagonalFisher
from ..operators.kronecker import KroneckerFisher
from ..operators.layered import Part
from ..root import CAP, Root, dense_rows
from .outputs import Head, read
from .precision import DensePrecision, Precision, in_words

HELD = 2**22  # scalars that a block of inputs may hold


def moments(model: Any, precision: Precision, x: Any, head: Head) -> tuple[jax.Array, jax.Array]:
    """Means [n, q] and covariances [n, q, q] of the linearised outputs, a block of inputs at a time."""
    x = None if x is None else jax.tree.map(jnp.asarray, x)
    root = jacobian(model, precision.theta, x, head)
    layers = layered.layers_of(root)
    if layers is not None and (layered.shared(layers) or not _by_layers(precision)):
        layers = None
    plan = _plan(precision, root, layers, head)
    size = max(1, min(root.n, HELD // plan.scalars))

    def everything(precision: Precision, x: Any, inverse: Any) -> tuple[jax.Array, jax.Array]:
        forms, theta = plan.forms(precision, inverse), precision.theta
        of_block = lambda rows: (read(model, theta, rows, head), forms(jacobian(model, theta, rows, head)))
        return _in_blocks(of_block, x, root.n, size)

    # the inverse outside: its checks call back into Python, and a program that does so cannot be shared
    return run(everything, precision, x, plan.inverse(precision))


def jacobian(model: Any, theta: Any, x: Any, head: Head) -> Root:
    """The root whose rows are d outputs / d theta, [n, q, d]."""

    def normal(theta: Any, *x: Any) -> Any:
        return dist.Normal(read(model, theta, x[0] if x else None, head), 1.0).to_event(1)

    n = 1 if x is None else row_count(x)
    return Root(normal, None, theta, Exact(), Plan("closed"), Rows(x, None, np.arange(n), np.ones(n)), (True, False), 1)


def written(model: Any, theta: Any, x: Any, head: Head) -> jax.Array:
    """The rows of J, [n, q, d]."""
    root = jacobian(model, theta, x, head)
    return dense_rows(root).reshape(root.n, head.q, root.d)


def _by_layers(precision: Precision) -> bool:
    return isinstance(precision, DensePrecision) or isinstance(precision.F, (DiagonalFisher, KroneckerFisher))


def _in_blocks(function: Callable[[Any], Any], x: Any, n: int, size: int) -> Any:
    """Arrays that `function` makes of blocks of rows, put together; the last block is filled with its first row."""
    if x is None or size >= n:
        return function(x)
    fill = -n % size
    blocks = jax.tree.map(lambda a: jnp.concatenate([a, jnp.repeat(a[:1], fill, 0)]).reshape(-1, size, *a.shape[1:]), x)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], jax.lax.map(function, blocks))


class Contraction(NamedTuple):
    """How the covariances of a block of inputs are computed.

    `inverse(precision)` gives what is needed of the covariance of theta, `forms(precision, inverse)` a function of a
    root, and `scalars` counts what that holds for one input.
    """

    inverse: Callable[[Precision], Any]
    forms: Callable[[Precision, Any], Callable[[Root], jax.Array]]
    scalars: int


def _plan(precision: Precision, root: Root, layers: Layers | None, head: Head) -> Contraction:
    q, d, n = head.q, root.d, root.n
    if layers is None:
        of_rows = lambda precision, _: lambda part: _of_rows(precision, dense_rows(part).reshape(part.n, q, d))
        return Contraction(lambda _: (), of_rows, 4 * q * d)
    sizes = jax.eval_shape(lambda r: layered.parts(r, layers), layered.first_row(root))
    thin = sum(leaf.size for leaf in jax.tree.leaves(sizes))
    if isinstance(precision, DensePrecision):
        if n * q < d:  # less work than the covariance itself
            return _plan(precision, root, None, head)
        pairs = [_held(p, r) for k, p in enumerate(sizes) for r in sizes[k:]]
        return Contraction(DensePrecision.covariance, lambda _, C: _dense(C, layers), thin + max(pairs))
    if isinstance(precision.F, DiagonalFisher):
        return Contraction(Precision.variances, lambda _, variances: _diagonal(variances, layers), 2 * thin)
    of_blocks = lambda precision, inverse: _kronecker(precision.F.blocks, inverse, layers)
    return Contraction(_eigenvalues, of_blocks, 4 * thin)


def _of_rows(precision: Precision, J: jax.Array) -> jax.Array:
    return precision.forms(jnp.swapaxes(J, 1, 2))


def _weighed(p: Part, variances: jax.Array) -> jax.Array:
    """Sum over entries [i, o] of (a_i g_ro) variance (a_i g_so), [n, q, q]."""
    if p.a is None:
        return jnp.einsum("nro,o,nso->nrs", p.g, variances[0], p.g)
    return jnp.einsum("nro,no,nso->nrs", p.g, p.a**2 @ variances, p.g)


def _diagonal(variances: jax.Array, layers: Layers) -> Callable[[Root], jax.Array]:
    def forms(root: Root) -> jax.Array:
        parts = zip(layered.parts(root, layers), layered.entries(layers), strict=True)
        return sum((_weighed(p, variances[at].reshape(p.widths)) for p, at in parts), jnp.zeros(()))

    return forms


def _eigenvalues(precision: Precision) -> list[jax.Array]:
    """Those of the covariance, [i, o] for each block of a Kronecker precision."""
    F = precision.F
    totals = in_words(precision.dtype, lambda: F._damped(precision.prior / precision.n / F.scale))
    return [1 / (precision.n * F.scale * total) for total in totals]


def _kronecker(blocks: Sequence[Block], totals: list[jax.Array], layers: Layers) -> Callable[[Root], jax.Array]:
    def forms(root: Root) -> jax.Array:
        parts = list(zip(layered.parts(root, layers), layered.entries(layers), strict=True))
        out = jnp.zeros(())
        for block, inverse in zip(blocks, totals, strict=True):
            out = out + _of_block(block, inverse, parts, layers)
        return out

    return forms


def _of_block(block: Block, inverse: jax.Array, parts: list[tuple[Part, np.ndarray]], layers: Layers) -> jax.Array:
    """The covariance from one block, whose eigenvalues of the covariance are `inverse` [i, o]."""
    for p, at in parts:
        if p.a is not None and np.array_equal(at, block.index.at):
            a = p.a if block.a.vectors is None else p.a @ block.a.vectors
            g = p.g if block.g.vectors is None else p.g @ block.g.vectors
            return _weighed(Part(a, g), inverse)
    n, q = parts[0][0].g.shape[:2]
    if not any(np.isin(at, block.index.at).any() for _, at in parts):
        return jnp.zeros(())  # parameters that move no output
    place = {int(entry): k for k, entry in enumerate(block.index.at)}
    J = jnp.zeros((n, q, len(place)), parts[0][0].g.dtype)
    for p, at in parts:
        mine = np.array([k for k, entry in enumerate(at) if int(entry) in place], int)
        if len(mine):
            to = np.array([place[int(entry)] for entry in at[mine]])
            J = J.at[:, :, to].set(p.rows().reshape(n, q, -1)[:, :, mine])
    W = block.into(J.reshape(n * q, -1).T).reshape(-1, n, q)
    return jnp.einsum("pnr,p,pns->nrs", W, inverse.ravel(), W)


def _outer(p: Part, r: Part) -> bool:
    """Whether contracting outer products of activations with the covariance is less work than multiplying rows."""
    (i, o), (j, k), q = p.widths, r.widths, p.g.shape[1]
    return p.a is not None and r.a is not None and i * j * o * k < q * i * o * j * k


def _held(p: Part, r: Part) -> int:
    """Scalars held for one input and two parts."""
    (i, o), (j, k), q = p.widths, r.widths, p.g.shape[1]
    return i * j + o * k * (1 + q) if _outer(p, r) else q * (i * o + 2 * j * k)


def _dense(C: jax.Array, layers: Layers) -> Callable[[Root], jax.Array]:
    where = layered.entries(layers)

    def forms(root: Root) -> jax.Array:
        parts = layered.parts(root, layers)
        out = jnp.zeros(())
        for k, p in enumerate(parts):
            for m, r in enumerate(parts[k:], k):
                form = _of_pair(p, r, C[where[k]][:, where[m]], k == m)
                out = out + (form if k == m else form + jnp.swapaxes(form, 1, 2))
        return out

    return forms


def _of_pair(p: Part, r: Part, C: jax.Array, same: bool) -> jax.Array:
    """J_p C J_r^T [n, q, q] for the covariance C [i o, j k] of two parts."""
    n, q = p.g.shape[:2]
    (i, o), (j, k) = p.widths, r.widths
    if not _outer(p, r):
        return jnp.einsum("nqp,nrp->nqr", (p.rows() @ C).reshape(n, q, -1), r.rows().reshape(n, q, -1))
    assert p.a is not None
    assert r.a is not None
    C = C.reshape(i, o, j, k).transpose(0, 2, 1, 3)
    if same:  # a_i a_j is symmetric: a triangle of it
        first, second = np.triu_indices(i)
        both = C[first, second] + jnp.where((first == second)[:, None, None], 0, C[second, first])
        T = (p.a[:, first] * p.a[:, second]) @ both.reshape(len(first), -1)
    else:
        T = (p.a[:, :, None] * r.a[:, None, :]).reshape(n, -1) @ C.reshape(i * j, -1)
    return jnp.einsum("nqo,nok,nrk->nqr", p.g, T.reshape(n, o, k), r.g)


def joint_covariance(model: Any, precision: Precision, x: Any, head: Head) -> jax.Array:
    """The covariance [n q, n q] of the outputs of all inputs; J is written out, and must fit `CAP` scalars."""
    root = jacobian(model, precision.theta, x, head)
    if root.n * head.q * root.d > CAP:
        raise ValueError(
            f"joint=True writes out {root.n} x {head.q} x {root.d} derivatives, more than {CAP}: ask for fewer inputs"
        )

    def everything(precision: Precision, x: Any) -> jax.Array:
        J = written(model, precision.theta, x, head).reshape(-1, root.d)
        return precision.forms(J.T[None])[0]

    return run(everything, precision, x)
