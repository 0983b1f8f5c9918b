"""Which parameters get a Kronecker product, and which a block that is formed whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..layers import Layers, leaf_names, leaf_sizes
from ..root import Root
from .layered import report

LARGEST = 4096  # parameters of a block that is formed whole
KRONECKER = ("dense", "convolution", "embedding")


class Whole(NamedTuple):
    """Entries whose block of F is formed: all of the layers in `of`, and those in `rest` where `of` has None."""

    of: tuple[int | None, ...]
    at: np.ndarray
    name: str


@dataclass(frozen=True, eq=False)  # hashed by identity: the programs of many batches are told apart by it
class Plan:
    layers: Layers | None
    product: tuple[int, ...]  # layers with a Kronecker product
    whole: tuple[Whole, ...]
    unused: np.ndarray
    leaves: Sequence[tuple[str, int]]


def make_plan(root: Root) -> Plan:
    leaves = leaf_sizes(root.theta)
    if root.rows.x is None:
        everything = np.arange(root.d)
        return Plan(
            None, (), (_small(Whole((None,), everything, leaf_names(everything, leaves))),), everything[:0], leaves
        )
    layers = report(root)
    product = tuple(j for j, layer in enumerate(layers.found) if layer.kind in KRONECKER and not layer.tied)
    others: list[tuple[int | None, np.ndarray]] = [(None, layers.rest)] if len(layers.rest) else []
    others += [(j, np.unique(layer.entries)) for j, layer in enumerate(layers.found) if j not in product]
    groups: list[tuple[list[int | None], np.ndarray]] = []
    for k, at in others:
        touching = [group for group in groups if np.intersect1d(group[1], at).size]
        members = [member for group in touching for member in group[0]]
        joined = np.unique(np.concatenate([at, *(group[1] for group in touching)]))
        groups = [group for group in groups if all(group is not t for t in touching)] + [([*members, k], joined)]
    whole = tuple(_small(Whole(tuple(ks), at, leaf_names(at, leaves)), layers) for ks, at in groups)
    return Plan(layers, product, whole, layers.unused, leaves)


def _small(whole: Whole, layers: Layers | None = None) -> Whole:
    if len(whole.at) > LARGEST:
        reasons = "" if layers is None else "; ".join(f"{m.parameters}: {m.reason}" for m in layers.missing)
        raise ValueError(
            f"{len(whole.at)} parameters ({whole.name}) are in no linear layer of their own, and a block of at most "
            f"{LARGEST} is formed whole" + (f" ({reasons})" if reasons else "") + ": write them as a linear layer (see "
            "linear_layers), or use diagonal_fisher, low_rank_fisher or implicit_fisher"
        )
    return whole
