"""The Fisher information as one Kronecker product for each linear layer (K-FAC)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..compilation import run
from ..expectation import rows_weight
from ..law import Exact, Law
from ..layers import Layer, leaf_names
from ..model import Model, is_traced, require
from ..root import Root, dense_rows, row_shape
from . import layered
from .base import Fisher, condition
from .blocks import Block, make_block
from .dense import law_name
from .plan import Plan, make_plan
from .row_blocks import over_blocks
from .streams import Passes, mean_over_rows, unit

Blocks = tuple[Block, ...]


def _each(blocks: Blocks, V: jax.Array, function: Callable[..., jax.Array], *more: Sequence[jax.Array]) -> jax.Array:
    """Apply `function(block, rows of V, one of each of more)` to every block and put the answers where they belong."""
    out = [function(block, V[block.index.at], *rest) for block, *rest in zip(blocks, *more, strict=True)]
    return layered.scatter(jnp.concatenate(out), np.concatenate([b.index.at for b in blocks]), len(V))


# compiled once for all blocks of these shapes, as no model is called in them


@jax.jit
def _add(blocks: Blocks, damping: jax.Array) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Eigenvalues of F + damping; by how much a block's damping differs; its smallest eigenvalue by the largest."""
    levels = [damping[block.index.at] if damping.ndim else damping for block in blocks]
    found = [block.values + jnp.ravel(level)[0] for block, level in zip(blocks, levels, strict=True)]
    ratio = [jnp.min(total) / jnp.maximum(jnp.max(total), jnp.finfo(total.dtype).tiny) for total in found]
    return found, jnp.stack([jnp.max(level) - jnp.min(level) for level in levels]), jnp.stack(ratio)


@jax.jit
def _divide(blocks: Blocks, V: jax.Array, totals: list[jax.Array]) -> jax.Array:
    return _each(blocks, V, lambda block, v, total: block.back(block.into(v) / total[..., None]), totals)


@jax.jit
def _inverse_diagonal(blocks: Blocks, V: jax.Array, totals: list[jax.Array]) -> jax.Array:
    inverse = lambda block, total: replace(block, values=1 / total, corrected=True)
    return _each(blocks, V, lambda block, _, total: inverse(block, total).diagonal()[:, None], totals)[:, 0]


@jax.jit
def _color(blocks: Blocks, white: jax.Array, totals: list[jax.Array]) -> jax.Array:
    scaled = lambda block, z, total: z.reshape(*block.shape, -1) / jnp.sqrt(total)[..., None]
    return _each(blocks, white, lambda block, z, total: block.back(scaled(block, z, total)), totals)


@jax.jit
def _logarithms(totals: list[jax.Array]) -> jax.Array:
    return jnp.sum(jnp.stack([jnp.sum(jnp.log(total)) for total in totals]))


class KroneckerFisher(Fisher):
    """F without the blocks between layers, and each layer's block as a Kronecker product.

    All methods are exact for that matrix: solves, determinants and draws go through its eigenbasis. A damping per leaf
    must be one number for all the leaves of a layer, or it would not separate.
    """

    blocks: Blocks

    def _each(self, V: jax.Array, function: Any) -> jax.Array:
        return _each(self.blocks, V, function)

    def _multiply(self, V: jax.Array) -> jax.Array:
        return self._each(V, lambda block, v: block.back(block.values[..., None] * block.into(v)))

    def _diagonal(self) -> jax.Array:
        return self._each(jnp.zeros((self.d, 1), self.dtype), lambda block, _: block.diagonal()[:, None])[:, 0]

    def trace(self) -> jax.Array:
        """The trace, a scalar."""
        return self.scale * sum(jnp.sum(block.values) for block in self.blocks)

    def _damped(self, damping: jax.Array) -> list[jax.Array]:
        """Eigenvalues of F + damping, [i, o] for each block."""
        found, spread, ratio = _add(self.blocks, damping)
        floor = 8 * max(max(b.shape) for b in self.blocks) * jnp.finfo(ratio.dtype).eps
        found = require(jnp.all(spread == 0), found, lambda: self._mixed(spread))
        return require(jnp.all(ratio > floor), found, lambda: self._singular(ratio, floor))

    def _mixed(self, spread: Any) -> str:
        names = "" if is_traced(spread) else " of " + self.blocks[int(jnp.argmax(spread))].name
        return (
            f"damping must be the same for all the leaves{names}, which are one layer: otherwise it does not separate"
        )

    def _singular(self, ratio: Any, floor: float) -> str:
        if is_traced(ratio):
            return "F + damping is singular to working precision: pass damping > 0"
        names = "; ".join([b.name for b, r in zip(self.blocks, ratio, strict=True) if not r > floor][:3])
        return f"F + damping is singular to working precision in {names}: pass damping > 0"

    def _solve(self, V: jax.Array, damping: jax.Array) -> jax.Array:
        return _divide(self.blocks, V, self._damped(damping))

    def _inverse_diagonal(self, damping: jax.Array) -> jax.Array:
        return _inverse_diagonal(self.blocks, jnp.zeros((self.d, 1), self.dtype), self._damped(damping))

    def _logdet(self, damping: jax.Array) -> jax.Array:
        return _logarithms(self._damped(damping))

    def _inverse_root(self, white: jax.Array, damping: jax.Array) -> jax.Array:
        return _color(self.blocks, white, self._damped(damping))

    def average(self, newer: Fisher, weight: Any) -> Fisher:
        if not isinstance(newer, KroneckerFisher):
            return super().average(newer, weight)
        blocks = []
        for old, new in zip(self.blocks, newer.blocks, strict=True):
            if old.corrected:
                raise ValueError("a corrected KroneckerFisher cannot be averaged: the eigenbases differ")
            mean = lambda old, new: (1 - weight) * old + weight * new
            A = mean(old.a.matrix, new.a.matrix)
            G = mean(self.scale * old.g.matrix, newer.scale * new.g.matrix)
            blocks.append(make_block(A, G, new.name, new.index.at))
        return KroneckerFisher(newer.theta, jnp.ones((), self.dtype), self.law, tuple(blocks))

    def _numbers(self) -> list[tuple[str, str]]:
        sizes = ", ".join(
            f"{b.name}: " + (f"{b.shape[0]} x {b.shape[1]}" if b.shape[0] > 1 else f"{b.shape[1]}") for b in self.blocks
        )
        return [*super()._numbers(), ("blocks", sizes)]

    def _condition(self) -> str:
        return condition(jnp.concatenate([block.values.ravel() for block in self.blocks]), self.d)


def kronecker_fisher(
    model: Model,
    theta: Any,
    x: Any = None,
    *,
    law: Law = Exact(),  # noqa: B008
    corrected: bool = False,
) -> KroneckerFisher:
    r"""Approximate the Fisher information by a Kronecker product for each layer, :math:`F_l \approx A_l \otimes G_l`.

    :math:`A = E[a^\top a]` is the second moment of a layer's inputs, with a 1 behind them where there is a bias, and
    :math:`G = E[g^\top g]` that of the signals that come back to its outputs, under `law`. Blocks between layers are
    left out. The block of a layer is exact where :math:`a^\top a` and :math:`g^\top g` are uncorrelated over inputs:
    for one input, or where G does not depend on the input, as in a deep linear network with normal outputs of fixed
    scale. A layer used at T positions (a convolution, a shared weight) counts each as an independent use. Parameters
    that are in no such layer get their own exact dense block. Inputs are taken in blocks of at most 2^26 scalars.

    Args:
        model: `model(theta, x)`, a distribution; its layers are found by `linear_layers`.
        theta: parameter pytree with d scalars, interior to its domain; units u.
        x: inputs with leading axis n, or `Batches` of them; F is the mean over them.
        law: `Exact()`, `MonteCarlo(key, draws)` with error O(1/sqrt(draws)), or `Data(y)`, the empirical Fisher.
        corrected: replace the products of eigenvalues by the second moments of R in that eigenbasis (EKFAC). The
            diagonal in the eigenbasis is then exact, and with it the trace.

    Returns:
        An operator of shape [d, d] in 1/u^2.

    Raises:
        ValueError: as `score_covariance`; parameters in no layer are more than 4096 in one block, and are named; a
            solve whose F + damping is singular, or whose damping differs within a layer.

    Example:
        >>> import numpyro.distributions as dist
        >>> model = lambda t, x: dist.Normal(jnp.tanh(x @ t["W"] + t["b"]) @ t["v"], 1.0)
        >>> theta = {"W": jnp.eye(2), "b": jnp.zeros(2), "v": jnp.ones(2)}
        >>> F = kronecker_fisher(model, theta, jnp.array([[0.5, -0.5], [1.0, 0.0]]))
        >>> print([block.name for block in F.blocks], F.solve(theta, damping=0.1)["v"].round(3))
        ['W, b', 'v'] [3.433 6.609]

    Derived in the chapter "K-FAC, built from nothing". Source: Martens and Grosse (2015), sections 2 and 3; George et
    al. (2018) for `corrected`.
    """
    plans: list[Plan] = []

    def moments(root: Root) -> Any:
        plans[:] = plans or [make_plan(root)]
        (plan,) = plans
        return run(lambda r: over_blocks(r, lambda part: _moments(part, plan), r.n * _width(r, plan)), root)

    passes = Passes()
    checked, found = mean_over_rows(model, theta, x, law, moments, passes)
    plan = plans[0]
    dtype = jnp.result_type(*jax.tree.leaves(checked))
    blocks = run(lambda m: _blocks(m, plan, dtype), found)
    if corrected and plan.layers is not None:

        def squares(root: Root) -> Any:
            def whole(r: Root, blocks: Any) -> Any:
                return over_blocks(r, lambda part: _second_moments(part, plan, blocks), r.n * _width(r, plan))

            return run(whole, root, blocks[: len(plan.product)])

        better = mean_over_rows(model, checked, x, law, squares, passes)[1]
        pairs = zip(blocks, better, strict=False)
        blocks = (*(replace(b, values=s, corrected=True) for b, s in pairs), *blocks[len(better) :])
    return KroneckerFisher(checked, unit(x, *(block.values for block in blocks)), law_name(law), blocks)


def _blocks(moments: Any, plan: Plan, dtype: Any) -> tuple[Block, ...]:
    products, wholes = moments
    one = jnp.ones(1, dtype)
    found = []
    for k, (A, G) in zip(plan.product, products, strict=True):
        assert plan.layers is not None
        found.append(make_block(A, G, plan.layers.found[k].parameters, plan.layers.found[k].entries))
    found += [make_block(one, M, whole.name, whole.at) for whole, M in zip(plan.whole, wholes, strict=True)]
    if len(plan.unused):
        name = leaf_names(plan.unused, plan.leaves)
        found.append(make_block(jnp.zeros(len(plan.unused), one.dtype), one, name, plan.unused))
    return tuple(found)


def _moments(root: Root, plan: Plan) -> tuple[list[tuple[jax.Array, jax.Array]], list[jax.Array]]:
    """Sums of a^T a (weighted to a mean) and g^T g over a block of inputs, and R^T R where it is formed whole."""
    layers = plan.layers
    if layers is None:
        R = dense_rows(root).reshape(-1, root.d)
        return [], [R.T @ R]
    activations, backward, rest = layered.signals(root, layers)
    weight = rows_weight(root.rows, root.flat.dtype) / root.total
    products = []
    for k in plan.product:
        layer, a, g = layers.found[k], activations[k], backward[k]
        g = g.reshape(-1, g.shape[-1])
        G = g.T @ g
        products.append((_second_moment(layer, a, weight / layer.positions), G))
    wholes = []
    for whole in plan.whole:
        R = jnp.zeros(
            (*backward[0].shape[:2], len(whole.at)) if backward else (*rest.shape[:2], len(whole.at)), root.flat.dtype
        )
        for j in whole.of:
            at = layers.rest if j is None else layers.found[j].entries
            rows = rest if j is None else layered.written(layers.found[j], activations[j], backward[j])
            R = R.at[:, :, np.searchsorted(whole.at, at)].add(rows)
        R = R.reshape(-1, len(whole.at))
        wholes.append(R.T @ R)
    return products, wholes


def _second_moment(layer: Layer, a: jax.Array, weight: jax.Array) -> jax.Array:
    if layer.kind == "embedding":  # one-hot rows: how often each is looked up
        counts = jnp.zeros(layer.weight.shape[0], weight.dtype)
        return counts.at[a].add(jnp.broadcast_to(weight[:, None], a.shape), mode="drop")
    a = layered.with_bias(layer, a)
    weighted = (a * weight[:, None, None]).reshape(-1, a.shape[-1])
    return weighted.T @ a.reshape(weighted.shape)


def _second_moments(root: Root, plan: Plan, blocks: Sequence[Block]) -> list[jax.Array]:
    """Squares of R's entries in each block's eigenbasis, summed over a block of inputs."""
    layers = plan.layers
    assert layers is not None
    activations, backward, _ = layered.signals(root, layers)
    out = []
    for k, block in zip(plan.product, blocks, strict=True):
        layer, a, g = layers.found[k], activations[k], backward[k]
        g = g if block.g.vectors is None else g @ block.g.vectors
        if layer.kind == "embedding":
            out.append(jnp.sum(layered.written(layer, a, g) ** 2, (0, 1)).reshape(block.shape))
            continue
        a = layered.with_bias(layer, a) @ block.a.vectors
        if layer.positions == 1:
            out.append((a[:, 0] ** 2).T @ jnp.sum(g[:, :, 0] ** 2, 1))
        else:
            out.append(jnp.sum(jnp.einsum("nti,nrto->nrio", a, g) ** 2, (0, 1)))
    return out


def _width(root: Root, plan: Plan) -> int:
    """Scalars held for one input."""
    layers, r = plan.layers, row_shape(root)
    if layers is None:
        return r * root.d
    held = sum(
        int(np.prod(layer.shift_shape)) * (r + 1) + layer.positions * layer.weight.shape[0] for layer in layers.found
    )
    return int(held + r * sum(len(whole.at) for whole in plan.whole))
