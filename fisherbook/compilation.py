"""Compile a program once, however often the function that writes it is made anew.

`jax.jit` remembers a function by identity. A model is often a fresh lambda, and a model remembered by identity would
go on answering for a global that has changed since. So every call traces, and compiles only a program not seen before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SEEN: OrderedDict[tuple[Any, ...], Callable[..., Any]] = OrderedDict()
CAPACITY = 512
APART: ContextVar[list[Any] | None] = ContextVar("APART", default=None)
OURS = __name__.removesuffix("compilation")
SHARED: ContextVar[dict[Any, Any] | None] = ContextVar("SHARED", default=None)


@contextmanager
def checks_apart() -> Iterator[list[Any]]:
    """Within, a check of a value that is not known yet goes into the list that this gives, not into the program.

    A program that calls back into Python cannot be shared. Whoever opens this returns the checks from the program,
    and raises where one has failed.
    """
    checks: list[Any] = []
    token = APART.set(checks)
    try:
        yield checks
    finally:
        APART.reset(token)


@contextmanager
def traced_once(programs: dict[Any, Any]) -> Iterator[None]:
    """Within, `run` traces a function once for arguments of one shape: the batches of one call are of one model.

    Functions are told apart by their code and by what they close over, so only values that can be hashed share.
    """
    token = SHARED.set(programs)
    try:
        yield
    finally:
        SHARED.reset(token)


def _name(function: Callable[..., Any], trees: Any) -> Any:
    """What `function` and the forms of its arguments are known by; None where that cannot be told."""

    def form(leaf: Any) -> Any:
        if not _is_number(leaf):
            return _closure(leaf)
        weak = getattr(leaf, "weak_type", isinstance(leaf, (int, float, complex)))
        where = leaf.sharding if getattr(leaf, "committed", False) else None
        return np.shape(leaf), jnp.result_type(leaf), weak, where

    leaves, structure = jax.tree.flatten(trees)
    name = (_closure(function), structure, *map(form, leaves))
    try:
        hash(name)
    except TypeError:
        return None
    return name


def _closure(value: Any) -> Any:
    """A function of this package, made anew from the same code over the same values, is the same; a model is itself."""
    if not (isinstance(value, FunctionType) and (value.__module__ or "").startswith(OURS)):
        return type(value), value  # 1 and True are equal
    cells = tuple(_closure(cell.cell_contents) for cell in value.__closure__ or ())
    return value.__code__, cells, value.__defaults__, tuple((value.__kwdefaults__ or {}).items())


def compile_once(function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """An executable of `function` for arguments of these shapes, shared by all functions that lower to one program.

    The constants a function closes over are part of its program. Where JAX passes them apart from it, or the
    program calls back into Python, the executable is the function's own.
    """
    program = jax.jit(function, keep_unused=True)  # else two programs of different arguments could be one text
    traced = program.trace(*args)
    if len(traced.jaxpr.in_avals) > len(jax.tree.leaves(args)):
        return program  # a value of an outer transformation is closed over: that transformation compiles
    lowered = traced.lower()
    if getattr(jax.config, "jax_use_simplified_jaxpr_constants", True):
        return lowered.compile()
    text = lowered.as_text()
    if "callback" in text:
        return lowered.compile()
    device = jax.config.jax_default_device
    where = tuple(leaf.sharding if getattr(leaf, "committed", False) else None for leaf in jax.tree.leaves(args))
    key = (text, str(lowered.in_tree), str(lowered.out_info), jax.default_backend(), str(device), where)
    if key not in SEEN:
        SEEN[key] = lowered.compile()
        if len(SEEN) > CAPACITY:
            SEEN.popitem(last=False)
    SEEN.move_to_end(key)
    return SEEN[key]


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float, complex))


def split_arrays(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays and numbers of a pytree, and what puts others in their place; its other leaves (functions) stay."""
    leaves, form = jax.tree.flatten(tree)
    numbers = [_is_number(leaf) for leaf in leaves]

    def whole(arrays: Sequence[Any]) -> Any:
        left = iter(arrays)
        mixed = [next(left) if number else leaf for number, leaf in zip(numbers, leaves, strict=True)]
        return jax.tree.unflatten(form, mixed)

    return [leaf for number, leaf in zip(numbers, leaves, strict=True) if number], whole


def run(function: Callable[..., Any], *trees: Any) -> Any:
    """`function(*trees)` as one compiled program; the answer must hold arrays only.

    Leaves that are no arrays (a function, an operator that is no pytree) are part of the program.
    """
    arrays, whole = split_arrays(trees)
    flat = lambda *arrays: function(*whole(arrays))
    if any(isinstance(leaf, jax.core.Tracer) for leaf in arrays):
        return (jax.jit(flat) if APART.get() is None else flat)(*arrays)  # a program within would keep its checks
    programs = SHARED.get()
    name = None if programs is None else _name(function, trees)
    if programs is None or name is None:
        return compile_once(flat, *arrays)(*arrays)
    if name not in programs:
        program = compile_once(flat, *arrays)
        if not isinstance(program, jax.stages.Compiled):
            return program(*arrays)  # it closes over a value of an outer transformation
        programs[name] = program
    return programs[name](*arrays)


def hide_constants(tree: Any) -> Any:
    """The same numbers, of which the compiler does not know where they come from.

    XLA for CPUs returns garbage for a product with a constant whose sum is subtracted from it (JAX 0.10 to 0.12):
    z - sum(p z) for z = h @ ones, which is a Fisher product of class probabilities with a constant vector.
    """
    floating = lambda leaf: jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    return jax.tree.map(lambda leaf: jax.lax.optimization_barrier(leaf) if floating(leaf) else leaf, tree)
