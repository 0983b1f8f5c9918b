"""The root through the linear layers of a network: activations and backward signals in place of rows.

For one input and one outcome, the part of R's row that belongs to a layer z = a W is the outer product a^T g. So the
block of F for two layers is a sum over inputs of (a a'^T) kron (sum over outcomes of g g'^T): one product whose inner
size is the number of inputs, whatever the number of outcomes. The diagonal and the trace follow the same way.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..layers import Layer, Layers, find_layers, jacobian_of, leaf_sizes
from ..root import Root, outputs, push, row_shape
from .row_blocks import over_blocks

ELEMENT = 8  # multiplications that cost as much as making one number of an outer product
SMALLER = {"diagonal": 4, "trace": 2}  # little is added up: blocks of a part of the inputs cost a tenth more time


class Part(NamedTuple):
    """R restricted to some entries of theta: outer products of a [n, i] and g [n, r, o], for entries in order [i, o].

    Rows that are written out are `g` [n, r, p] with a of None.
    """

    a: jax.Array | None
    g: jax.Array

    @property
    def widths(self) -> tuple[int, int]:
        return 1 if self.a is None else self.a.shape[1], self.g.shape[2]

    def rows(self) -> jax.Array:
        """The rows [n r, p], written out."""
        g = self.g if self.a is None else self.a[:, None, :, None] * self.g[:, :, None, :]
        return g.reshape(self.g.shape[0] * self.g.shape[1], -1)


def layers_of(root: Root) -> Layers | None:
    """The layers of what theta moves, for one row of inputs; None where there is no input or no layer."""
    found = None if root.rows.x is None else report(root)
    return found if found is not None and found.found else None


def report(root: Root) -> Layers:
    """The layers of what theta moves, and what is in none."""
    return find_layers(
        lambda flat, one: outputs(one, one.unravel(flat)), root.flat, first_row(root), leaf_sizes(root.theta)
    )


def first_row(root: Root) -> Root:
    return replace(root, rows=jax.tree.map(lambda a: jnp.asarray(a)[:1], root.rows))


def signals(root: Root, layers: Layers) -> tuple[list[Any], list[jax.Array], jax.Array]:
    """Activations [n, T, in] and signals [n, r, T, out] of the layers, and rows [n, r, p] for entries in none.

    The weights of the rows are in the signals: R's row in a layer is the sum over T of a^T g.
    """

    def one(part: Root) -> tuple[list[Any], list[jax.Array], jax.Array]:
        start = layers.zero_shifts(root.flat.dtype), jnp.zeros(len(layers.rest), root.flat.dtype)
        out, pull, activations = jax.vjp(
            lambda s, rest: layers.perturbed(part.flat, part, s, rest), *start, has_aux=True
        )
        linear = push(part)
        shape = jax.eval_shape(linear, out)
        back = jax.linear_transpose(linear, out)
        units = jnp.eye(shape.size, dtype=shape.dtype).reshape(-1, *shape.shape)
        return activations, *jax.vmap(lambda u: pull(back(u)[0]))(units)

    rows = jax.tree.map(lambda a: jnp.asarray(a)[:, None], root.rows)
    return jax.vmap(lambda r: one(replace(root, rows=r)))(rows)


def is_product(layer: Layer) -> bool:
    """Whether a row of R in the layer is one outer product."""
    return layer.kind in ("dense", "convolution") and layer.positions == 1


def with_bias(layer: Layer, a: jax.Array) -> jax.Array:
    """Activations with a 1 behind them where there is a bias: its signal is that of the layer's output."""
    return a if layer.bias is None else jnp.concatenate([a, jnp.ones_like(a[..., :1])], -1)


def parts(root: Root, layers: Layers) -> list[Part]:
    """R, layer by layer; layers with several positions, and entries in none, are written out."""
    activations, backward, rest = signals(root, layers)
    out = []
    for layer, a, g in zip(layers.found, activations, backward, strict=True):
        if is_product(layer):
            out.append(Part(with_bias(layer, a[:, 0]), g[:, :, 0]))
        else:
            out.append(Part(None, written(layer, a, g)))
    return [*out, Part(None, rest)] if len(layers.rest) else out


def written(layer: Layer, a: Any, g: jax.Array) -> jax.Array:
    """Rows [n, r, p] of R in a layer."""
    row = lambda a, g: jax.vmap(lambda g: jacobian_of(layer, a, g))(g)
    return jax.vmap(row)(a, g) if a is not None else jax.vmap(lambda g: row(None, g))(g)


def entries(layers: Layers) -> list[np.ndarray]:
    """Positions in the flat parameter of the columns of each of `parts`."""
    found = [layer.entries for layer in layers.found]
    return [*found, layers.rest] if len(layers.rest) else found


def pays(root: Root, layers: Layers) -> bool:
    """Whether some block of F is less work from activations and signals than from rows of R."""
    forms = jax.eval_shape(lambda one: parts(one, layers), first_row(root))
    return any(_cost(p, q)[0] for k, p in enumerate(forms) for q in forms[k:])


# --- the matrix ---------------------------------------------------------------------------------------------


def matrix(root: Root, layers: Layers) -> jax.Array:
    """F [d, d], a block of inputs at a time."""
    products = lambda part: _products(parts(part, layers))
    whole = over_blocks(root, products, root.n * _width(root, layers), root.d**2)
    where = entries(layers)
    sizes = [len(e) for e in where]
    forms = jax.eval_shape(lambda r: parts(r, layers), first_row(root))
    rows = []
    for p in range(len(where)):
        blocks = []
        for q in range(len(where)):
            P = _spread(whole[min(p, q)][max(p, q) - min(p, q)], forms[min(p, q)], forms[max(p, q)], p == q)
            blocks.append(P if p <= q else P.T)
        rows.append(jnp.concatenate(blocks, 1))
    F = jnp.concatenate(rows, 0)
    at = np.concatenate(where)
    if len(np.unique(at)) < len(at):  # shared entries: derivatives add
        F = jnp.zeros((root.d, sum(sizes)), F.dtype).at[at].add(F)
        F = jnp.zeros((root.d, root.d), F.dtype).at[:, at].add(F)
        return (F + F.T) / 2
    return scatter(scatter(F, at, root.d).T, at, root.d).T


def scatter(rows: jax.Array, at: np.ndarray, d: int) -> jax.Array:
    """Rows put at the positions `at` of d, zeros elsewhere."""
    back = np.full(d, len(at))
    back[at] = np.arange(len(at))
    if len(at) < d:
        rows = jnp.concatenate([rows, jnp.zeros((1, *rows.shape[1:]), rows.dtype)])
    return rows if (back == np.arange(d)).all() else rows[back]


def _width(root: Root, layers: Layers) -> int:
    """Scalars held for one input: the largest outer products of two layers, or rows written out."""
    r, forms = row_shape(root), jax.eval_shape(lambda one: parts(one, layers), first_row(root))
    pairs = [_cost(p, q)[1] for k, p in enumerate(forms) for q in forms[k:]]
    return max(pairs) + sum(r * p.widths[1] + p.widths[0] for p in forms)


def _cost(p: Part, q: Part) -> tuple[bool, int]:
    """Whether outer products of activations and of signals are cheaper than rows, and the scalars they hold."""
    (i, o), (j, k), r = p.widths, q.widths, p.g.shape[1]
    outer = i * j * o * k / (4 if p is q else 1) + ELEMENT * (i * j + r * o * k)
    rows = r * i * o * j * k
    if (p.a is None and q.a is None) or rows <= outer:
        return False, r * (i * o + j * k)
    return True, i * j + r * o * k


def _products(parts: list[Part]) -> list[list[jax.Array]]:
    """For every two parts p <= q the block of F, in the order that `_spread` undoes."""
    return [[_product(p, q) for q in parts[k:]] for k, p in enumerate(parts)]


def _product(p: Part, q: Part) -> jax.Array:
    if not _cost(p, q)[0]:
        return p.rows().T @ q.rows()
    n = len(p.g)
    a = p.a if p.a is not None else jnp.ones((n, 1), p.g.dtype)
    b = q.a if q.a is not None else jnp.ones((n, 1), p.g.dtype)
    if p is q:  # both factors are symmetric: a triangle of each
        (i, j), (o, k) = np.triu_indices(a.shape[1]), np.triu_indices(p.g.shape[2])
        gg = jnp.einsum("nro,nrk->nok", p.g, p.g)[:, o, k]
        return (a[:, i] * a[:, j]).T @ gg
    gg = jnp.einsum("nro,nrk->nok", p.g, q.g).reshape(n, -1)
    return (a[:, :, None] * b[:, None, :]).reshape(n, -1).T @ gg


def _spread(P: jax.Array, p: Part, q: Part, same: bool) -> jax.Array:
    """The block of F [p, q] from what `_product` gave, symmetric where p is q; `p` and `q` may be shapes."""
    if not _cost(p, p if same else q)[0]:
        return (P + P.T) / 2 if same else P
    (i, o), (j, k) = p.widths, q.widths
    if same:
        P = P[_triangle(i)][:, _triangle(o)]
    return P.reshape(i, j, o, k).transpose(0, 2, 1, 3).reshape(i * o, j * k)


def _triangle(m: int) -> np.ndarray:
    """For every entry of an m x m symmetric matrix its place in the upper triangle, row by row."""
    at = np.zeros((m, m), int)
    at[np.triu_indices(m)] = np.arange(m * (m + 1) // 2)
    return np.maximum(at, at.T).ravel()


# --- the Gram matrix ------------------------------------------------------------------------------------------


def gram(root: Root, layers: Layers) -> jax.Array:
    """R R^T [n r, n r], from products of activations and of signals; no entry may be shared by two layers."""
    return sum(map(_inner, parts(root, layers)), jnp.zeros((), root.flat.dtype))


def _inner(p: Part) -> jax.Array:
    n, r = p.g.shape[:2]
    signals = p.g.reshape(n * r, -1)
    inner = signals @ signals.T
    if p.a is None:
        return inner
    return (inner.reshape(n, r, n, r) * (p.a @ p.a.T)[:, None, :, None]).reshape(n * r, n * r)


# --- the diagonal and the trace -------------------------------------------------------------------------------


def diagonal(root: Root, layers: Layers) -> jax.Array:
    """The diagonal [d] of F; no entry may be shared by two layers."""

    def block(part: Root) -> list[jax.Array]:
        return [_squares(p) for p in parts(part, layers)]

    found = over_blocks(root, block, SMALLER["diagonal"] * thin(root, layers))
    return scatter(jnp.concatenate(found), np.concatenate(entries(layers)), root.d)


def _squares(p: Part) -> jax.Array:
    squares = jnp.sum(p.g**2, 1)
    return jnp.sum(squares, 0) if p.a is None else ((p.a**2).T @ squares).ravel()


def trace(root: Root, layers: Layers) -> jax.Array:
    """The trace of F; no entry may be shared by two layers."""

    def block(part: Root) -> jax.Array:
        sizes = [jnp.sum(p.g**2, (1, 2)) * (1 if p.a is None else jnp.sum(p.a**2, 1)) for p in parts(part, layers)]
        return jnp.sum(jnp.stack(sizes))

    return over_blocks(root, block, SMALLER["trace"] * thin(root, layers))


def thin(root: Root, layers: Layers) -> int:
    """Scalars held by the activations, signals and rows written out of all inputs."""
    one = jax.eval_shape(lambda one: parts(one, layers), first_row(root))
    return root.n * sum(leaf.size for leaf in jax.tree.leaves(one))


def shared(layers: Layers) -> bool:
    """Whether an entry of theta is in two layers, or twice in one."""
    return any(layer.tied for layer in layers.found)
