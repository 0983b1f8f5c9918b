"""A JAX function as a list of steps, and which of its values are entries of the parameter, only rearranged.

Calls (`jit`, `checkpoint`) that a parameter enters are opened. A rule of its own (`custom_jvp`, `custom_vjp`) is never
opened: its derivative need not be that of its body, so what is inside says nothing about how a parameter enters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"}
SMALL = 2**16  # constants are worked out while tracing up to this size: they are indices and factors


class Entries(NamedTuple):
    """A value that is factor * theta[positions], plus at most what does not depend on theta."""

    positions: np.ndarray
    factor: float = 1.0


class Step(NamedTuple):
    """One operation: values at `inputs` go to values at `outputs`."""

    name: str
    params: Mapping[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    run: Callable[..., list[Any]]
    effects: bool


@dataclass(frozen=True, eq=False)
class Program:
    """The steps that the outputs need. Values have numbers; `entries` holds those that are parameters."""

    steps: tuple[Step, ...]
    flat: int
    row: tuple[int, ...]
    outputs: tuple[int, ...]
    constants: Mapping[int, Any]
    types: Sequence[Any]
    entries: Mapping[int, Entries]
    varying: frozenset[int]
    structure: Any

    def shape(self, value: int) -> tuple[int, ...]:
        return tuple(self.types[value].shape)

    def is_float(self, value: int) -> bool:
        return bool(jnp.issubdtype(getattr(self.types[value], "dtype", bool), jnp.inexact))


def trace(function: Callable[..., Any], flat: Any, row: Any) -> Program:
    """The program of `function(flat, row)`, in which `flat` is the parameter."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(flat, row)
    reader = _Reader()
    inputs = [reader.new(var.aval) for var in closed.jaxpr.invars]
    reader.varying |= set(inputs)
    reader.entries[inputs[0]] = Entries(np.arange(flat.size, dtype=np.int64 if flat.size >= 2**31 else np.int32))
    outputs = reader.read(closed.jaxpr, closed.consts, inputs)
    live, steps = set(outputs), []
    for step in reversed(reader.steps):
        if step.effects or live & set(step.outputs):
            live |= set(step.inputs)
            steps.append(step)
    return Program(
        tuple(reversed(steps)),
        inputs[0],
        tuple(inputs[1:]),
        tuple(outputs),
        reader.constants,
        reader.types,
        reader.entries,
        frozenset(reader.varying),
        jax.tree.structure(shapes),
    )


@dataclass
class _Reader:
    steps: list[Step] = field(default_factory=list)
    types: list[Any] = field(default_factory=list)
    constants: dict[int, Any] = field(default_factory=dict)
    entries: dict[int, Entries] = field(default_factory=dict)
    varying: set[int] = field(default_factory=set)  # depend on theta or the row
    made_by: dict[int, Step] = field(default_factory=dict)

    def new(self, aval: Any) -> int:
        self.types.append(aval)
        return len(self.types) - 1

    def constant(self, aval: Any, value: Any) -> int:
        self.constants[new := self.new(aval)] = value
        return new

    def read(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[int]) -> list[int]:
        """Append the steps of a jaxpr whose inputs are the given values; the numbers of its outputs."""
        number = {var: self.constant(var.aval, c) for var, c in zip(jaxpr.constvars, consts, strict=True)}
        number |= dict(zip(jaxpr.invars, inputs, strict=True))

        def value(atom: Any) -> int:
            if isinstance(atom, jex.Literal):
                return self.constant(atom.aval, np.asarray(atom.val, atom.aval.dtype))
            return number[atom]

        for eqn in jaxpr.eqns:
            atoms = [value(atom) for atom in eqn.invars]
            if eqn.primitive.name in CALLS and any(atom in self.entries for atom in atoms):
                inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
                outputs = self.read(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), atoms)
            else:
                outputs = self.append(jaxpr, eqn, atoms)
            number |= dict(zip(eqn.outvars, outputs, strict=True))
        return [value(atom) for atom in jaxpr.outvars]

    def append(self, jaxpr: Any, eqn: Any, inputs: list[int]) -> list[int]:
        outputs = [self.new(var.aval) for var in eqn.outvars]
        step = Step(
            eqn.primitive.name, eqn.params, tuple(inputs), tuple(outputs), _runner(jaxpr, eqn), bool(eqn.effects)
        )
        self.steps.append(step)
        self.made_by |= dict.fromkeys(outputs, step)
        if any(value in self.varying for value in inputs):
            self.varying |= set(outputs)
        found = rearranged(self, step) if any(value in self.entries for value in inputs) else None
        for value, entries in zip(outputs, found or (), strict=False):
            if jnp.issubdtype(self.types[value].dtype, jnp.floating):
                self.entries[value] = entries
        return outputs

    def known(self, value: int, depth: int = 16) -> np.ndarray | None:
        """The number behind a small constant, or None."""
        step = self.made_by.get(value)
        if jnp.issubdtype(self.types[value].dtype, jax.dtypes.extended):
            return None  # a random key
        if value in self.constants:
            held = self.constants[value]
            return None if isinstance(held, jax.core.Tracer) or np.size(held) > SMALL else np.asarray(held)
        if value in self.varying or step is None or depth == 0 or step.effects or self.types[value].size > SMALL:
            return None
        inputs = [self.known(i, depth - 1) for i in step.inputs]
        if any(i is None for i in inputs):
            return None
        with jax.ensure_compile_time_eval():
            return np.asarray(step.run(*inputs)[step.outputs.index(value)])

    def factor(self, value: int) -> float | None:
        """The one number that fills a constant, or None."""
        while self.types[value].size != 1 and value in self.made_by:
            step = self.made_by[value]
            if step.name not in ("broadcast_in_dim", "reshape", "convert_element_type", "squeeze", "transpose"):
                return None
            value = step.inputs[0]
        held = self.known(value) if self.types[value].size == 1 else None
        return None if held is None else float(held.reshape(()))


def _runner(jaxpr: Any, eqn: Any) -> Callable[..., list[Any]]:
    """The step as a function of all its inputs, by JAX's own evaluation of a program of one equation."""
    free = [not isinstance(atom, jex.Literal) for atom in eqn.invars]
    kept = [not isinstance(var, jex.DropVar) for var in eqn.outvars]
    one = jaxpr.replace(
        constvars=[],
        invars=[atom for atom, on in zip(eqn.invars, free, strict=True) if on],
        outvars=[var for var, on in zip(eqn.outvars, kept, strict=True) if on],
        eqns=[eqn],
        effects=eqn.effects,
    )
    call = jex.jaxpr_as_fun(jex.ClosedJaxpr(one, []))

    def run(*values: Any) -> list[Any]:
        out = iter(call(*(value for value, on in zip(values, free, strict=True) if on)))
        return [next(out) if on else None for on in kept]

    return run


# --- what leaves a parameter a parameter -----------------------------------------------------------------------


def _broadcast(index: np.ndarray, params: Mapping[str, Any]) -> np.ndarray:
    shape, dims = params["shape"], params["broadcast_dimensions"]
    unit = [1] * len(shape)
    for axis, length in zip(dims, index.shape, strict=True):
        unit[axis] = length
    return np.broadcast_to(index.reshape(unit), shape)


def _slice(index: np.ndarray, params: Mapping[str, Any]) -> np.ndarray:
    strides = params["strides"] or [None] * index.ndim
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return index[tuple(slice(*bound) for bound in bounds)]


MOVES: dict[str, Callable[[np.ndarray, Mapping[str, Any]], np.ndarray]] = {
    "reshape": lambda index, params: index.reshape(params["new_sizes"]),
    "squeeze": lambda index, params: np.squeeze(index, params["dimensions"]),
    "transpose": lambda index, params: index.transpose(params["permutation"]),
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "rev": lambda index, params: np.flip(index, params["dimensions"]),
    "copy": lambda index, params: index,
    "copy_p": lambda index, params: index,
    "sharding_constraint": lambda index, params: index,
    "convert_element_type": lambda index, params: index,
}


def rearranged(reader: _Reader, step: Step) -> list[Entries] | None:
    """The entries of theta that the step's outputs are, where they are no more than that."""
    held = [reader.entries.get(value) for value in step.inputs]
    if step.name == "concatenate":
        return _concatenated(held, step.params["dimension"])
    if sum(entries is not None for entries in held) > 1:
        return None
    operand = next(j for j, entries in enumerate(held) if entries is not None)
    index, factor = held[operand] or Entries(np.empty(0))
    if step.name in MOVES and operand == 0:
        return [Entries(MOVES[step.name](index, step.params), factor)]
    if step.name == "split":
        cuts, axis = np.cumsum(step.params["sizes"])[:-1], step.params["axis"]
        return [Entries(part, factor) for part in np.split(index, cuts, axis)]
    if step.name in ("dynamic_slice", "gather") and operand == 0:
        return _picked(reader, step, index, factor)
    if step.name == "neg":
        return [Entries(index, -factor)]
    return _shifted_or_scaled(reader, step, operand, index, factor) if len(step.inputs) == 2 else None


def _concatenated(held: Sequence[Entries | None], axis: int) -> list[Entries] | None:
    known = [entries for entries in held if entries is not None]
    if len(known) < len(held) or len({entries.factor for entries in known}) > 1:
        return None
    return [Entries(np.concatenate([entries.positions for entries in known], axis), known[0].factor)]


def _picked(reader: _Reader, step: Step, index: np.ndarray, factor: float) -> list[Entries] | None:
    """Entries taken at constant indices; None where the indices vary, or some lie outside."""
    at = [held for value in step.inputs[1:] if (held := reader.known(value)) is not None]
    if len(at) < len(step.inputs) - 1:
        return None
    if step.name == "dynamic_slice":
        sizes = step.params["slice_sizes"]
        starts = [min(max(int(i), 0), n - k) for i, n, k in zip(at, index.shape, sizes, strict=True)]
        return [Entries(index[tuple(slice(i, i + k) for i, k in zip(starts, sizes, strict=True))], factor)]
    names = ("dimension_numbers", "slice_sizes", "mode", "unique_indices", "indices_are_sorted")
    with jax.ensure_compile_time_eval():
        options = {name: step.params[name] for name in names}
        picked = np.asarray(jax.lax.gather(index, at[0], fill_value=-1, **options))
    return [Entries(picked, factor)] if picked.min(initial=0) >= 0 else None


def _shifted_or_scaled(
    reader: _Reader, step: Step, operand: int, index: np.ndarray, factor: float
) -> list[Entries] | None:
    """Add what does not depend on theta or the row, or multiply by one constant number."""
    other = step.inputs[1 - operand]
    if other in reader.varying or step.name not in ("add", "add_any", "sub", "mul", "div"):
        return None
    index = np.broadcast_to(index, reader.types[step.outputs[0]].shape)
    if step.name in ("add", "add_any", "sub"):
        return [Entries(index, -factor if step.name == "sub" and operand == 1 else factor)]
    number = None if step.name == "div" and operand == 1 else reader.factor(other)
    if number is None or number == 0 or not np.isfinite(number):
        return None
    return [Entries(index, factor * number if step.name == "mul" else factor / number)]
