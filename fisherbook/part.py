"""A part of theta: which of its numbers are uncertain, and the model as a function of them alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .model import Model


class Part(eqx.Module):
    """Some leaves of theta, or entries of them; all other numbers are held fixed."""

    theta: Any
    places: tuple[int, ...] = eqx.field(static=True)  # the numbers of the leaves in theta's list of them
    entries: tuple[Any, ...]  # of each: None where the whole leaf is selected, or where in it, of the selection's shape

    def whole(self, part: Any) -> Any:
        """theta with the numbers of `part` in their places."""
        leaves, tree = jax.tree.flatten(self.theta)
        for place, entries, leaf in zip(self.places, self.entries, jax.tree.leaves(part), strict=True):
            old = jnp.asarray(leaves[place])
            leaves[place] = (
                leaf if entries is None else old.ravel().at[entries].set(leaf, unique_indices=True).reshape(old.shape)
            )
        return jax.tree.unflatten(tree, leaves)


class PartOfModel:
    """A model as a function of a part of theta."""

    def __init__(self, model: Model, part: Part) -> None:
        self.model, self.part = model, part

    def __call__(self, theta: Any, *x: Any) -> Any:
        return self.model(self.part.whole(theta), *x)


def select(theta: Any, subset: Callable[[Any], Any]) -> tuple[Part, Any]:
    """What `subset` selects: where it is, and its values."""
    leaves, tree = jax.tree.flatten(theta)
    sizes = [np.arange(np.size(leaf)).reshape(np.shape(leaf)) for leaf in leaves]
    wrong = (
        "subset must return leaves of theta, or entries of them, as they are and each once, as in "
        "lambda t: (t['w'], t['b'][:2])"
    )
    try:
        chosen = subset(jax.tree.unflatten(tree, [_Place(k, size) for k, size in enumerate(sizes)]))
    except (TypeError, AttributeError, ValueError) as error:  # arithmetic with a leaf
        raise ValueError(wrong) from error
    found = jax.tree.leaves(chosen)
    if any(type(place) is not _Place for place in found):
        raise ValueError(wrong)
    if not sum(place.size for place in found):
        raise ValueError("subset selects nothing: it must return a part of theta, as in lambda t: t['out']")
    every = np.concatenate([np.stack([np.full(p.size, p.number), p.entries.ravel()]) for p in found], 1)
    if len(np.unique(every, axis=1).T) < every.shape[1]:
        raise ValueError(wrong)
    entries = tuple(None if np.array_equal(p.entries, sizes[p.number]) else jnp.asarray(p.entries) for p in found)
    part = Part(theta, tuple(place.number for place in found), entries)
    values = [
        leaves[p.number] if where is None else jnp.ravel(leaves[p.number])[where]
        for p, where in zip(found, entries, strict=True)
    ]
    return part, jax.tree.unflatten(jax.tree.structure(chosen), values)


class _Place:
    """Stands for a leaf while `subset` selects: it can be indexed and given another shape, and nothing else."""

    def __init__(self, number: int, entries: np.ndarray) -> None:
        self.number, self.entries = number, entries
        self.shape, self.ndim, self.size = entries.shape, entries.ndim, entries.size

    def __getitem__(self, index: Any) -> _Place:
        return _Place(self.number, np.asarray(self.entries[index]))

    def __len__(self) -> int:
        return len(self.entries)

    def reshape(self, *shape: Any) -> _Place:
        return _Place(self.number, self.entries.reshape(*shape))

    def ravel(self) -> _Place:
        return _Place(self.number, self.entries.ravel())

    @property
    def T(self) -> _Place:
        return _Place(self.number, self.entries.T)
