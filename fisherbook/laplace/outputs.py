"""The outputs of a model in unconstrained coordinates, and the distribution that given outputs make."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from ..dependence import depends
from ..families import find_family, innermost
from ..model import Model, call, row_count

AS_THEY_ARE = ("logits", "loc")  # have no edge


class Output(NamedTuple):
    """One parameter of a distribution, for one row: its shape, that of its coordinates, whether it is probabilities."""

    name: str
    shape: tuple[int, ...]
    free: tuple[int, ...]
    classes: bool


class Head(NamedTuple):
    """The parameters of a model's distribution that theta moves, q numbers for each row."""

    outputs: tuple[Output, ...]
    events: int  # dimensions that `Independent` adds to the event

    @property
    def q(self) -> int:
        return sum(int(np.prod(o.free)) for o in self.outputs)


def find_head(model: Model, theta: Any, x: Any) -> Head:
    """Read off one row of inputs which parameters theta moves."""
    if x is not None:
        row_count(x)
    one = None if x is None else jax.tree.map(lambda a: jnp.asarray(a)[:1], x)
    every: list[Output] = []
    events = 0

    def look(theta: Any) -> tuple[jax.Array, ...]:
        nonlocal events
        whole = call(model, theta, one)
        inner = innermost(whole)
        values = {name: jnp.asarray(getattr(inner, name)) for name in _names(inner)}
        for name, value in values.items():
            axes = _event_axes(inner, name)
            shape = (*inner.batch_shape[0 if x is None else 1 :], *value.shape[value.ndim - axes :])
            classes = name == "probs" and axes > 0
            plain = classes or name in AS_THEY_ARE
            free = shape if plain else dist.transforms.biject_to(_constraint(inner, name)).inverse_shape(shape)
            every.append(Output(name, tuple(shape), tuple(free), classes))
        events = len(whole.event_shape) - len(inner.event_shape)
        return tuple(values.values())

    outputs = [output for output, moves in zip(every, depends(look, theta), strict=True) if moves]
    if not outputs:
        names = ", ".join(output.name for output in every)
        raise ValueError(
            f"theta moves none of the parameters that {type(innermost(call(model, theta, one))).__name__} declares "
            f"({names}), so there are no outputs to linearise: use method='samples'"
        )
    return Head(tuple(outputs), events)


def read(model: Model, theta: Any, x: Any, head: Head) -> jax.Array:
    """Outputs [n, q], in coordinates that have no edge."""
    inner = innermost(call(model, theta, x))
    n = 1 if x is None else inner.batch_shape[0]
    found = []
    for o in head.outputs:
        value = jnp.asarray(getattr(inner, o.name))
        rows = () if x is None else (n,)
        value = jnp.broadcast_to(value, (*rows, *o.shape))
        found.append(_free(inner, o, value).reshape(n, -1))
    return jnp.concatenate(found, 1)


def rebuild(model: Model, theta: Any, x: Any, head: Head, outputs: jax.Array) -> Any:
    """The distribution with the outputs [n, *more, q] in place of the model's own, with batch [n, *more]."""
    inner = innermost(call(model, theta, x))
    batch = outputs.shape[:-1] if x is not None else outputs.shape[1:-1]
    extra = len(outputs.shape) - 2
    rows = 0 if x is None else 1
    sites = inner.batch_shape[rows:]
    arguments = {}
    for name in _arguments(inner):
        value = jnp.asarray(getattr(inner, name))
        axes = _event_axes(inner, name)
        event = value.shape[value.ndim - axes :] if axes else ()
        value = jnp.broadcast_to(value, (*inner.batch_shape, *event))
        arguments[name] = value.reshape(*inner.batch_shape[:rows], *[1] * extra, *sites, *event)
    at = 0
    for o in head.outputs:
        size = int(np.prod(o.free))
        value = outputs[..., at : at + size].reshape(*batch, *o.free)
        arguments[o.name] = _bound(inner, o, value)
        at += size
    built = type(inner)(**arguments)
    return built.to_event(head.events) if head.events else built


def _names(d: Any) -> tuple[str, ...]:
    family = find_family(d)
    if family is not None:
        return family.parameters
    names = tuple(name for name in _arguments(d) if name in d.__dict__)
    if not names:
        raise ValueError(
            f"{type(d).__name__} does not say what its parameters are (arg_constraints): use method='samples'"
        )
    return names


def _arguments(d: Any) -> list[str]:
    """Parameters of the constructor that the distribution keeps; of several forms of one, the triangular root."""
    known = inspect.signature(type(d).__init__).parameters
    names = [name for name in known if name in getattr(d, "arg_constraints", {}) and hasattr(d, name)]
    return [
        name for name in names if "scale_tril" not in names or name not in ("covariance_matrix", "precision_matrix")
    ]


def _event_axes(d: Any, name: str) -> int:
    return next((c[name].event_dim for cls in type(d).__mro__ if name in (c := getattr(cls, "arg_constraints", {}))), 0)


def _free(d: Any, o: Output, value: jax.Array) -> jax.Array:
    if o.name in AS_THEY_ARE:
        return value
    if o.classes:  # of the logits that give these probabilities, those whose sum is zero
        return jnp.log(value) - jnp.mean(jnp.log(value), -1, keepdims=True)
    if o.name == "probs":
        return jnp.log(value) - jnp.log1p(-value)
    return dist.transforms.biject_to(_constraint(d, o.name)).inv(value)


def _bound(d: Any, o: Output, value: jax.Array) -> jax.Array:
    if o.name in AS_THEY_ARE:
        return value
    if o.name == "probs":
        return jax.nn.softmax(value, -1) if o.classes else jax.nn.sigmoid(value)
    return dist.transforms.biject_to(_constraint(d, o.name))(value)


def _constraint(d: Any, name: str) -> Any:
    return next(c[name] for cls in type(d).__mro__ if name in (c := getattr(cls, "arg_constraints", {})))
