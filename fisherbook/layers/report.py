"""What was found, as a report to read and as a function whose layers can be shifted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_flatten_with_path

from ..model import Model, call, flatten, path_name, row_count, take_rows
from .layer import Layer, Leaves, attach_biases, group_sites, leaf_names
from .sites import OUTPUT, PRODUCTS, Lost, Site, find_sites, operand_entries
from .tracing import Program, trace


class Missing(NamedTuple):
    """Parameters that are in no layer: their names, their positions in the flat parameter, and why."""

    parameters: str
    positions: np.ndarray
    reason: str


@dataclass(frozen=True, eq=False)
class Layers:
    """What was found: a report, and the function in a form that lets every layer's output be shifted.

    Attributes:
        found: the layers; together they hold every parameter that is not in `rest` or `unused`.
        missing: parameters that enter in another way, with the reason.
        rest: positions of all `missing` parameters, ascending.
        unused: positions of parameters that the outputs do not depend on.
    """

    found: tuple[Layer, ...]
    missing: tuple[Missing, ...]
    rest: np.ndarray
    unused: np.ndarray
    names: str  # of the unused
    program: Program
    sites: tuple[Site, ...]
    lost: tuple[Lost, ...]

    @property
    def everything(self) -> bool:
        """Whether every parameter that is used is in a layer."""
        return not self.missing

    def zero_shifts(self, dtype: Any = float) -> list[jax.Array]:
        """A shift [T, out] of zeros for each layer."""
        return [jnp.zeros(layer.shift_shape, dtype) for layer in self.found]

    def perturbed(
        self, flat: jax.Array, row: Any, shifts: Sequence[jax.Array], rest: jax.Array | None = None
    ) -> tuple[Any, list[jax.Array | None]]:
        """Outputs for one row with each layer's output shifted, and each layer's activations.

        One reverse pass with respect to `shifts` (and `rest`, which is added to the parameters in no layer) gives the
        backward signals of all layers. Activations are [T, in] for products, indices [T] for an embedding (the number
        of rows stands for none), None for a scale or shift, whose signal is the derivative already.
        """
        program, moves, products = self.program, self._moves(shifts, rest), self._products()
        env = {**program.constants, program.flat: flat}
        env |= dict(zip(program.row, jax.tree.leaves(row), strict=True))
        seen: dict[int, jax.Array] = {}
        for k, step in enumerate(program.steps):
            values = [_moved(env[value], moves.get((k, j))) for j, value in enumerate(step.inputs)]
            out = step.run(*values)
            if k in products:
                s, site = products[k], self.sites[products[k]]
                seen[s] = site.activation(values)
                out[0] = out[0] + site.arrange(self._shift(s, shifts)).astype(out[0].dtype)
            env |= dict(zip(step.outputs, out, strict=True))
        outputs = [_moved(env[value], moves.get((OUTPUT, j))) for j, value in enumerate(program.outputs)]
        return jax.tree.unflatten(program.structure, outputs), [self._activation(layer, seen) for layer in self.found]

    def _products(self) -> dict[int, int]:
        return {site.step: s for s, site in enumerate(self.sites) if site.kind in PRODUCTS}

    def _shift(self, s: int, shifts: Sequence[jax.Array]) -> jax.Array:
        """The shifts [groups, T, out] of one site, taken from those of the layers it is a part of."""
        site, groups = self.sites[s], {}
        for layer, shift in zip(self.found, shifts, strict=True):
            start = 0
            for part, group in layer.parts:
                stop = start + self.sites[part].positions
                if part == s:
                    groups[group] = shift[start:stop]
                start = stop
        stacked = jnp.stack([groups[g] for g in range(len(groups))])
        return stacked * site.factor if site.kind == "embedding" and site.factor != 1 else stacked

    def _activation(self, layer: Layer, seen: dict[int, jax.Array]) -> jax.Array | None:
        parts = [seen[s][group] for s, group in layer.parts if s in seen]
        return None if not parts else parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def _moves(self, shifts: Sequence[jax.Array], rest: jax.Array | None) -> dict[tuple[int, int], jax.Array]:
        """What is added to an operand: the shift of a scale's or shift's parameters, or the rest."""
        moves = {}
        for layer, shift in zip(self.found, shifts, strict=True):
            for s, _ in layer.parts if layer.kind not in PRODUCTS else ():
                site = self.sites[s]
                moves[site.step, site.operand] = _spread(shift[0], layer.weight, site.weight) * site.factor
        for use in self.lost if rest is not None else ():
            entries = operand_entries(self.program, use.step, use.operand)
            moves[use.step, use.operand] = _spread(rest, self.rest, entries.positions) * entries.factor
        return moves

    def __str__(self) -> str:
        rows = self._table()
        widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(lines + self._notes())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cells = lambda tag, row: "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
        head, *body = self._table()
        rows = "".join(f"<tr>{cells('td', row)}</tr>" for row in body)
        notes = "".join(f"<p>{escape(note)}</p>" for note in self._notes())
        return f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>{rows}</tbody></table>{notes}"

    def _table(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("layer", "kind", "parameters", "weight", "bias", "positions", "shared")]
        for i, layer in enumerate(self.found):
            size = " x ".join(map(str, layer.weight.shape))
            bias = "no" if layer.bias is None else "yes"
            shared = f"{layer.uses} uses" if layer.uses > 1 else "entries" if layer.tied else "no"
            rows.append((str(i), layer.kind, layer.parameters, size, bias, str(layer.positions), shared))
        return rows

    def _notes(self) -> list[str]:
        notes = [f"not found: {name}: {reason}" for name, _, reason in self.missing]
        return notes + ([f"unused: {self.names}"] if self.unused.size else [])


def _moved(value: Any, by: jax.Array | None) -> Any:
    return value if by is None else value + by.astype(value.dtype)


def _spread(vector: jax.Array, entries: np.ndarray, positions: np.ndarray) -> jax.Array:
    """Each position's number in `vector`, which holds one for each of `entries`, ascending."""
    at, shape = np.searchsorted(entries, positions), positions.shape
    for axis in range(at.ndim):  # repeated along an axis: broadcast, so that the transpose is a sum, not a scatter
        if (at == at.take([0], axis)).all():
            at = at.take([0], axis)
    first = int(at.flat[0])
    if (at.ravel() == np.arange(first, first + at.size)).all():
        return jnp.broadcast_to(vector[first : first + at.size].reshape(at.shape), shape)
    return vector[np.searchsorted(entries, positions)]


def linear_layers(model: Model, theta: Any, x: Any = None) -> Layers:
    r"""Find where parameters enter the model's distribution linearly, as :math:`z = a W + b`.

    There the derivative of an output f is :math:`\partial f / \partial W = a^\top g` with the activation a and the
    backward signal :math:`g = \partial f / \partial z`. The parameters of the distribution for the first row of x are
    traced, through `jax.jit`, `jax.checkpoint`, `jax.vmap` and unrolled loops. What stands inside `scan`, `while` or
    `cond`, or inside a function with a derivative rule of its own (`custom_jvp`, `custom_vjp`), is not opened:
    parameters that enter there are reported as not found, as are those that enter otherwise than linearly.

    Args:
        model: `model(theta)` or `model(theta, x)`, a distribution.
        theta: parameter pytree with d scalars; only its shapes matter.
        x: inputs with leading axis n, for a conditional model; only the shapes of the first row matter.

    Returns:
        A report, which prints as a table: `.found`, `.missing` with reasons, `.everything`.

    Raises:
        TypeError: the model does not return a distribution.
        ValueError: theta or x is malformed.

    Example:
        >>> import numpyro.distributions as dist
        >>> def model(theta, x):
        ...     h = jnp.tanh(x @ theta["W"] + theta["b"])
        ...     return dist.Normal(h @ theta["v"], jnp.exp(theta["log_sigma"]))
        >>> theta = {"W": jnp.ones((3, 4)), "b": jnp.ones(4), "v": jnp.ones(4), "log_sigma": 0.0}
        >>> print(linear_layers(model, theta, jnp.ones((10, 3))))
        layer  kind   parameters  weight  bias  positions  shared
        0      dense  W, b        3 x 4   yes   1          no
        1      dense  v           4 x 1   no    1          no
        not found: log_sigma: enters exp

    Derived in the chapter "K-FAC, built from nothing". Source: Martens and Grosse (2015), section 2; Grosse and Martens
    (2016), section 3.
    """
    flat, unravel = flatten(theta)
    if x is not None:
        row_count(x)
    row = None if x is None else jax.tree.map(jnp.asarray, take_rows(x, slice(0, 1)))
    floating = lambda leaf: jnp.issubdtype(jnp.result_type(leaf), jnp.floating)

    def outputs(flat: jax.Array, row: Any) -> list[jax.Array]:
        leaves = jax.tree.leaves(call(model, unravel(flat), row))
        return [jnp.asarray(leaf) for leaf in leaves if floating(leaf)]

    return find_layers(outputs, flat, row, leaf_sizes(theta))


def leaf_sizes(theta: Any) -> list[tuple[str, int]]:
    return [(path_name(path), int(np.size(leaf))) for path, leaf in tree_flatten_with_path(theta)[0]]


def find_layers(function: Callable[[jax.Array, Any], Any], flat: jax.Array, row: Any, leaves: Leaves) -> Layers:
    """The linear layers of `function(flat, row)`, for one row whose leading axis is kept; only shapes matter."""
    program = trace(function, flat, row)
    sites, lost = find_sites(program)
    sites, biases = attach_biases(program, sites)
    found = group_sites(sites, biases, leaves)
    count = np.bincount(np.concatenate([np.empty(0, int), *(layer.entries for layer in found)]), minlength=flat.size)
    found = [replace(layer, tied=bool((count[layer.entries] > 1).any())) for layer in found]
    missing = _missing(program, lost, leaves)
    gone = np.zeros(flat.size, bool)
    for part in missing:
        gone[part.positions] = True
    unused = np.flatnonzero((count == 0) & ~gone)
    rest, names = np.flatnonzero(gone), leaf_names(unused, leaves)
    return Layers(tuple(found), missing, rest, unused, names, program, tuple(sites), tuple(lost))


def _missing(program: Program, lost: Sequence[Lost], leaves: Leaves) -> tuple[Missing, ...]:
    reasons: dict[str, np.ndarray] = {}
    for use in lost:
        positions = operand_entries(program, use.step, use.operand).positions.ravel()
        told = np.concatenate([positions[:0], *reasons.values()]) if use.reason not in reasons else positions[:0]
        positions = np.setdiff1d(positions, told)
        reasons[use.reason] = np.union1d(reasons.get(use.reason, positions[:0]), positions)
    return tuple(Missing(leaf_names(p, leaves), p, reason) for reason, p in reasons.items() if p.size)
