"""Where entries of the parameter enter a program linearly: products, convolutions, look-ups, scales and shifts.

Each primitive that can hold such a site is one rule: from a step and the operand that holds the parameter to a `Site`,
or to the reason why there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .tracing import Entries, Program, Step

PRODUCTS = ("dense", "convolution", "embedding")
GROUPS = 64  # products of a batched product that are taken as layers of their own
OUTPUT = -1  # the step of a site where a parameter is itself an output


@dataclass(frozen=True, eq=False)
class Site:
    """A use of parameters that is linear in them.

    A product has weight positions [groups, in, out]; `activation` maps the step's inputs to [groups, T, in] (to indices
    [groups, T] for a look-up), and `arrange` maps [groups, T, out] to the shape of the step's output. A scale or a
    shift has the positions of the operand alone.
    """

    kind: str
    step: int
    operand: int
    weight: np.ndarray
    factor: float
    positions: int = 1
    activation: Any = None
    arrange: Any = None


class Lost(NamedTuple):
    """A use of parameters that is not linear in them, or not seen to be."""

    step: int
    operand: int
    reason: str


Rule = Callable[[Program, int, int, Entries], Site | str]


def find_sites(program: Program) -> tuple[list[Site], list[Lost]]:
    """All uses of parameters; entries that are lost at one use are lost at every other."""
    sites: list[Site] = []
    lost: list[Lost] = []
    for k, step in enumerate(program.steps):
        held = [j for j, value in enumerate(step.inputs) if value in program.entries and 0 not in program.shape(value)]
        for j in held if _differentiable(program, step) else []:
            found = _use(program, k, j, len(held))
            sites += [found] if isinstance(found, Site) else []
            lost += [Lost(k, j, found)] if isinstance(found, str) else []
    for j, value in enumerate(program.outputs):
        if value in program.entries:
            sites.append(Site("shift", OUTPUT, j, *program.entries[value]))
    return _without_lost(program, sites, lost)


def _differentiable(program: Program, step: Step) -> bool:
    """Whether the step does more than rearrange parameters, and has a derivative."""
    moved = all(value in program.entries for value in step.outputs)
    return not moved and step.name != "stop_gradient" and any(program.is_float(value) for value in step.outputs)


def _use(program: Program, k: int, operand: int, held: int) -> Site | str:
    step = program.steps[k]
    if held > 1 and step.name in RULES and step.name not in SELECTIONS:
        return f"meets another parameter in {step.name}"
    if step.name in RULES:
        return RULES[step.name](program, k, operand, program.entries[step.inputs[operand]])
    if step.name.startswith("custom_"):
        return f"enters {step.name}, whose derivative is a rule of its own"
    return f"enters {step.name}" + (", which is not opened" if step.name in ("scan", "while", "cond") else "")


def operand_entries(program: Program, step: int, operand: int) -> Entries:
    return program.entries[program.outputs[operand] if step == OUTPUT else program.steps[step].inputs[operand]]


def _without_lost(program: Program, sites: list[Site], lost: list[Lost]) -> tuple[list[Site], list[Lost]]:
    gone = np.zeros(program.types[program.flat].size, bool)
    for use in lost:
        gone[operand_entries(program, use.step, use.operand).positions] = True
    while hit := [site for site in sites if gone[site.weight].any()]:
        sites = [site for site in sites if site not in hit]
        lost = lost + [Lost(site.step, site.operand, "enters together with entries that are lost") for site in hit]
        for site in hit:
            gone[site.weight] = True
    return sites, lost


# --- one rule for each primitive ------------------------------------------------------------------------------


def _dense(program: Program, k: int, operand: int, entries: Entries) -> Site | str:
    step = program.steps[k]
    contract, batch = step.params["dimension_numbers"]
    positions, mine, other = entries.positions, operand, 1 - operand
    a_shape = program.shape(step.inputs[other])
    free = [i for i in range(positions.ndim) if i not in contract[mine] and i not in batch[mine]]
    a_free = [i for i in range(len(a_shape)) if i not in contract[other] and i not in batch[other]]
    order, a_order = (*batch[mine], *contract[mine], *free), (*batch[other], *a_free, *contract[other])
    G, T = prod(a_shape[i] for i in batch[other]), prod(a_shape[i] for i in a_free)
    K, C = prod(a_shape[i] for i in contract[other]), prod(positions.shape[i] for i in free)
    W = positions.transpose(order).reshape(G, K, C)
    same = G == 1 or bool((W[:1] == W).all())  # one weight for the whole batch: more positions
    if not same and G > GROUPS:
        return f"enters a product of {G} matrices (at most {GROUPS} are taken apart)"
    shape, factor = program.shape(step.outputs[0]), entries.factor

    def activation(values: Sequence[Any]) -> jax.Array:
        a = values[other].transpose(a_order).reshape((1, G * T, K) if same else (G, T, K))
        return a if factor == 1 else a * factor

    def arrange(z: Any) -> Any:
        z = z.reshape(G, T, C)
        return (z if operand == 1 else z.swapaxes(1, 2)).reshape(shape)

    return Site("dense", k, operand, W[:1] if same else W, factor, G * T if same else T, activation, arrange)


def _convolution(program: Program, k: int, operand: int, entries: Entries) -> Site | str:
    step = program.steps[k]
    if operand != 1 or step.params["feature_group_count"] != 1 or step.params["batch_group_count"] != 1:
        return "enters a grouped convolution, or one in which it is no kernel"
    numbers, factor = step.params["dimension_numbers"], entries.factor
    (N, F, *S), (O, I, *R), (ON, OF, *OS) = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    W = entries.positions.transpose((*R, I, O))
    window, shape = W.shape[:-2], program.shape(step.outputs[0])
    unit = [shape[i] for i in (ON, *OS, OF)]

    def activation(values: Sequence[Any]) -> jax.Array:
        a = patches(values[0].transpose((N, *S, F)), window, unit[1:-1], step.params)
        a = a.reshape(1, prod(unit[:-1]), -1)
        return a if factor == 1 else a * factor

    def arrange(z: Any) -> Any:
        return z.reshape(unit).transpose([int(i) for i in np.argsort((ON, *OS, OF))])

    weight = W.reshape(1, -1, W.shape[-1])
    return Site("convolution", k, 1, weight, factor, prod(unit[:-1]), activation, arrange)


def patches(a: jax.Array, window: Sequence[int], size: Sequence[int], params: Any) -> jax.Array:
    """What each position of a convolution sees of a [N, *space, F]: [N, *size, *window * F], by slices, so exactly."""
    margin = [(0, 0, 0), *((*p, s - 1) for p, s in zip(params["padding"], params["lhs_dilation"], strict=True))]
    a = jax.lax.pad(a, jnp.zeros((), a.dtype), [*margin, (0, 0, 0)])
    strides, dilation = params["window_strides"], params["rhs_dilation"]
    seen = []
    for offset in np.ndindex(*window):
        start = [i * step for i, step in zip(offset, dilation, strict=True)]
        stop = [i + (n - 1) * step + 1 for i, n, step in zip(start, size, strides, strict=True)]
        seen.append(
            jax.lax.slice(a, [0, *start, 0], [a.shape[0], *stop, a.shape[-1]], [1, *strides, 1])  # one offset
        )
    return jnp.concatenate(seen, -1)


def _look_up(program: Program, k: int, operand: int, entries: Entries) -> Site | str:
    """Whole rows at indices that vary; indices along other axes do not matter where all of the axis is taken."""
    step, positions = program.steps[k], entries.positions
    numbers, sizes = step.params["dimension_numbers"], step.params["slice_sizes"]
    collapsed, drop = numbers.collapsed_slice_dims, step.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP
    axis = _row_axis(positions.shape, sizes, collapsed)
    several = numbers.operand_batching_dims or (drop and len(numbers.start_index_map) > 1)
    if operand != 0 or axis is None or axis not in numbers.start_index_map or several:
        return "is picked by indices that vary along several axes"
    W = np.moveaxis(positions, axis, 0)
    rows, rest = len(W), [size for i, size in enumerate(sizes) if i not in collapsed]
    batch, column = program.shape(step.inputs[1])[:-1], numbers.start_index_map.index(axis)
    offset = numbers.offset_dims
    order = [*(i for i in range(len(batch) + len(rest)) if i not in offset), *offset]  # rows, then what a row holds

    def activation(values: Sequence[Any]) -> jax.Array:
        i = values[1][..., column].reshape(1, prod(batch))
        return jnp.where((i < 0) | (i >= rows), rows, i) if drop else jnp.clip(i, 0, rows - 1)

    def arrange(z: Any) -> Any:
        return z.reshape(*batch, *rest).transpose([int(i) for i in np.argsort(order)])

    return Site("embedding", k, 0, W.reshape(1, rows, -1), entries.factor, prod(batch), activation, arrange)


def _row_axis(shape: Sequence[int], sizes: Sequence[int], collapsed: Sequence[int] = ()) -> int | None:
    """The axis of which one entry is taken, and all of every other."""
    axes = [i for i, size in enumerate(sizes) if size != shape[i]] or list(collapsed)
    return axes[0] if len(axes) == 1 and sizes[axes[0]] == 1 else None


def _row(program: Program, k: int, operand: int, entries: Entries) -> Site | str:
    """One row at an index that varies: a look-up of one position."""
    step, positions = program.steps[k], entries.positions
    axis = _row_axis(positions.shape, step.params["slice_sizes"])
    if operand != 0 or axis is None:
        return "is picked by indices that vary along several axes"
    W = np.moveaxis(positions, axis, 0)
    rows, shape = len(W), program.shape(step.outputs[0])
    activation = lambda values: jnp.clip(values[1 + axis], 0, rows - 1).reshape(1, 1)
    return Site("embedding", k, 0, W.reshape(1, rows, -1), entries.factor, 1, activation, lambda z: z.reshape(shape))


def _scale(program: Program, k: int, operand: int, entries: Entries) -> Site | str:
    step = program.steps[k]
    if step.name == "div" and operand == 1:
        return "divides"
    if step.inputs[1 - operand] not in program.varying:
        return "is multiplied by constants"  # as many products as entries: no layer
    return Site("scale", k, operand, *entries)


def _shift(program: Program, k: int, operand: int, entries: Entries) -> Site | str:
    return Site("shift", k, operand, *entries)


SELECTIONS = {"concatenate", "pad", "select_n"}  # some outputs are the parameter: a shift of what were zero


RULES: dict[str, Rule] = {
    "dot_general": _dense,
    "conv_general_dilated": _convolution,
    "gather": _look_up,
    "dynamic_slice": _row,
    "mul": _scale,
    "div": _scale,
    "add": _shift,
    "add_any": _shift,
    "sub": _shift,
    **dict.fromkeys(SELECTIONS, _shift),
}
