"""From places to layers: a bias belongs to the product before it, and one weight at two places is one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .sites import PRODUCTS, Site
from .tracing import MOVES, Program

Leaves = Sequence[tuple[str, int]]  # name and size of each leaf of theta, in `ravel_pytree` order


@dataclass(frozen=True, eq=False)
class Layer:
    """One linear layer: z = a W + b at each of its positions, or the scale or shift of what is there already.

    Attributes:
        kind: "dense", "convolution", "embedding", "scale" or "shift".
        weight: positions in the flat parameter, [in, out]; [rows, out] of an embedding, [features] of a scale or shift.
        bias: positions [out] of the bias added to every position's output, or None.
        positions: number T of positions of one row of inputs at which the layer is used.
        uses: number of places in the program where these parameters enter; more than 1 is sharing.
        tied: whether an entry is also in another layer, or twice in this one: derivatives with respect to it add.
        parameters: names of the leaves of theta, for the reader.
        parts: the sites, each with its group; their positions stand behind one another.
    """

    kind: str
    weight: np.ndarray
    bias: np.ndarray | None
    positions: int
    uses: int
    tied: bool
    parameters: str
    parts: tuple[tuple[int, int], ...]

    @property
    def entries(self) -> np.ndarray:
        """Positions in the flat parameter of what `jacobian_of` returns."""
        return np.concatenate([self.weight.ravel(), *([] if self.bias is None else [self.bias])])

    @property
    def shift_shape(self) -> tuple[int, int]:
        """Shape [T, out] of a shift of the layer's output, and of its backward signal."""
        return (self.positions, self.weight.shape[1]) if self.kind in PRODUCTS else (1, self.weight.size)


def jacobian_of(layer: Layer, activation: jax.Array | None, signal: jax.Array) -> jax.Array:
    """Derivative of one number with respect to `layer.entries`, from a row's activation and backward signal [T, out].

    The weight's is a^T g, summed over positions, and the bias's is the sum of g. Entries that occur twice (where
    `layer.tied`) must be added: `jnp.zeros(d).at[layer.entries].add(...)`.
    """
    if activation is None:
        return signal[0]
    if layer.kind == "embedding":
        return jnp.zeros(layer.weight.shape, signal.dtype).at[activation].add(signal, mode="drop").ravel()
    weight = jnp.matmul(activation.T, signal, precision="highest").ravel()
    return weight if layer.bias is None else jnp.concatenate([weight, signal.sum(0)])


def attach_biases(program: Program, sites: list[Site]) -> tuple[list[Site], dict[int, np.ndarray]]:
    """Take the shifts that follow a product at once, and add one number per output, as its bias [groups, out].

    The product's backward signal is then the bias's too: on the way are only rearrangements and sums, and no step
    outside it sees the values on the way.
    """
    at = {(site.step, site.operand): site for site in sites}
    uses = np.bincount([v for step in program.steps for v in step.inputs] + list(program.outputs))
    origin: dict[int, tuple[Site, np.ndarray]] = {}  # values that are a product's output, and which of its numbers
    biases: dict[Site, np.ndarray] = {}
    taken: set[Site] = set()
    for k, step in enumerate(program.steps):
        product = next((at[k, j] for j in range(len(step.inputs)) if (k, j) in at and at[k, j].arrange), None)
        if product is not None and product.kind != "embedding":
            shape = (len(product.weight), product.positions, product.weight.shape[2])
            origin[step.outputs[0]] = product, product.arrange(np.arange(np.prod(shape)).reshape(shape))
            continue
        for j in range({"add": 2, "add_any": 2, "sub": 1}.get(step.name, int(step.name in MOVES))):
            value, out = step.inputs[j], step.outputs[0]
            if value not in origin or uses[value] > 1 or out in origin:
                continue
            product, ids = origin[value]
            ids = MOVES[step.name](ids, step.params) if step.name in MOVES else ids
            shift = at.get((k, 1 - j)) if step.name in ("add", "add_any") else None
            if ids.shape != program.shape(out):
                continue
            bias = None if shift is None or product in biases else _bias(product, ids, shift)
            if shift is not None and bias is not None:
                biases[product] = bias
                taken.add(shift)
            origin[out] = product, ids
    kept = [site for site in sites if site not in taken]
    return kept, {s: biases[site] for s, site in enumerate(kept) if site in biases}


def _bias(product: Site, ids: np.ndarray, shift: Site) -> np.ndarray | None:
    """Positions [groups, out] of the shift, where it is the same at all positions of the product."""
    b = np.empty(ids.size, shift.weight.dtype)
    b[ids.ravel()] = np.broadcast_to(shift.weight, ids.shape).ravel()
    b = b.reshape(len(product.weight), product.positions, -1)
    single = all(len(np.unique(group)) == group.size for group in b[:, 0])
    return b[:, 0] if single and shift.factor == 1 and (b == b[:, :1]).all() else None


def group_sites(sites: Sequence[Site], biases: dict[int, np.ndarray], leaves: Leaves) -> list[Layer]:
    """Layers of the sites: those with one weight and one bias are one layer at more positions."""
    parts: dict[Any, list[tuple[int, int]]] = {}
    weights = {}
    for s, site in enumerate(sites):
        product = site.kind in PRODUCTS
        for g in range(len(site.weight) if product else 1):
            W = site.weight[g] if product else np.unique(site.weight)
            b = biases[s][g] if s in biases else None
            key = site.kind, W.shape, W.tobytes(), None if b is None else b.tobytes()
            weights[key] = W, b
            parts.setdefault(key, []).append((s, g))
    found = []
    for key, (W, b) in weights.items():
        positions = sum(sites[s].positions for s, _ in parts[key])
        layer = Layer(key[0], W, b, positions, len(parts[key]), False, "", tuple(parts[key]))
        found.append(replace(layer, parameters=leaf_names(layer.entries, leaves)))
    return found


def leaf_names(positions: np.ndarray, leaves: Leaves) -> str:
    """Names of the leaves that hold the positions; of a leaf that holds others too, the range of its entries."""
    held = np.zeros(sum(size for _, size in leaves), bool)
    held[positions] = True
    names, start = [], 0
    for name, size in leaves:
        own = held[start : start + size]
        count, first = int(own.sum()), int(own.argmax()) if size else 0
        if count == size:
            names += [name] if size else []
        elif count:
            names.append(
                f"{name}[{first}:{first + count}]" if own[first:][:count].all() else f"{count} of {size} in {name}"
            )
        start += size
    return ", ".join(names)
