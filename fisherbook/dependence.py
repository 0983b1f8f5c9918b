"""Which outputs of a function depend on its inputs, read off its program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def depends(function: Callable[[Any], tuple[Any, ...]], theta: Any) -> tuple[bool, ...]:
    """Which outputs of `function` depend on theta, read off its program."""
    closed = jax.make_jaxpr(function)(theta)
    return _reached(closed.jaxpr, [True] * len(closed.jaxpr.invars))


def _reached(jaxpr: Any, inputs: list[bool]) -> tuple[bool, ...]:
    seen = {v for v, on in zip(jaxpr.invars, inputs, strict=True) if on}
    moves = lambda atom: not hasattr(atom, "val") and atom in seen
    for eqn in jaxpr.eqns:
        on = [moves(atom) for atom in eqn.invars]
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        inner = getattr(inner, "jaxpr", inner)
        if eqn.primitive.name == "stop_gradient" or not any(on):
            continue
        same = inner is not None and len(inner.invars) == len(on) and len(inner.outvars) == len(eqn.outvars)
        calls = same and eqn.primitive.name not in ("scan", "while", "cond")
        outs = _reached(inner, on) if calls else [True] * len(eqn.outvars)
        seen |= {v for v, out in zip(eqn.outvars, outs, strict=True) if out}
    return tuple(moves(atom) for atom in jaxpr.outvars)
