"""A part of theta: which leaves are uncertain, and the model as a function of them alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from .model import Model


class Part(eqx.Module):
    """Some leaves of theta, by their numbers in its list of leaves; the others are held fixed."""

    theta: Any
    places: tuple[int, ...] = eqx.field(static=True)

    def whole(self, part: Any) -> Any:
        """theta with the leaves of `part` in their places."""
        leaves, tree = jax.tree.flatten(self.theta)
        for place, leaf in zip(self.places, jax.tree.leaves(part), strict=True):
            leaves[place] = leaf
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
    wrong = "subset must return leaves of theta as they are, each once, as in lambda t: (t['w'], t['b'])"
    try:
        places = subset(jax.tree.unflatten(tree, [_Place(k) for k in range(len(leaves))]))
    except (TypeError, AttributeError) as error:  # arithmetic with a leaf, or an index of it
        raise ValueError(wrong) from error
    found = jax.tree.leaves(places)
    if not found:
        raise ValueError("subset selects nothing: it must return a part of theta, as in lambda t: t['out']")
    if any(type(place) is not _Place for place in found) or len({p.number for p in found}) < len(found):
        raise ValueError(wrong)
    part = Part(theta, tuple(place.number for place in found))
    return part, jax.tree.map(lambda place: leaves[place.number], places)


class _Place:
    """Stands for a leaf while `subset` selects."""

    def __init__(self, number: int) -> None:
        self.number = number
