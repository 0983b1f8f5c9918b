"""Damping that adapts: the predicted decrease of a loss is compared with the actual one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Damping that adapts to how well the quadratic model predicts the loss (Levenberg, 1944; Marquardt, 1963).

    After each step the reduction ratio, actual over predicted decrease, is compared with 1/4 and 3/4: damping is
    multiplied by `factor` below and divided by it above. A step that would increase the loss is not taken.

    Args:
        initial: damping of the first step, in the unit of F.
        factor: above 1.
        minimum, maximum: bounds of the damping.

    Example:
        >>> LevenbergMarquardt(initial=0.1).factor
        4.0
    """

    initial: float = 1.0
    factor: float = 4.0
    minimum: float = 1e-10
    maximum: float = 1e10

    def __post_init__(self) -> None:
        if not (0 < self.minimum <= self.initial <= self.maximum and self.factor > 1):
            raise ValueError(f"needs 0 < minimum <= initial <= maximum and factor > 1, got {self}")


def adapt(
    rule: LevenbergMarquardt,
    state: Any,
    step: Any,
    value_fn: Callable[[Any], Any],
    params: Any,
    predicted: Any,
) -> tuple[Any, Any]:
    """Compare the decrease with the predicted one, change the damping, and leave out a step that increases the loss.

    `state` is a `NaturalGradientState`; `predicted` is the change of the loss in the quadratic model.
    """
    before, after = (jnp.asarray(value_fn(t)) for t in (params, jax.tree.map(jnp.add, params, step)))
    if before.ndim:
        raise ValueError(f"value_fn must return a number, the loss of the batch, not an array {before.shape}")
    ratio = jnp.where(predicted < 0, (after - before) / jnp.where(predicted < 0, predicted, 1), 0.0)
    bad = ~(after <= before)  # also where the loss is not finite
    ratio = jnp.where(bad & ~(ratio < 0), -jnp.inf, ratio)
    factor = jnp.where(ratio > 0.75, 1 / rule.factor, jnp.where(ratio < 0.25, rule.factor, 1.0))
    at_rest = (before == after) & (jnp.abs(predicted) <= 4 * jnp.finfo(before.dtype).eps * jnp.abs(before))
    factor = jnp.where(at_rest, 1.0, factor)
    taken = jax.tree.map(lambda leaf: jnp.where(bad, jnp.zeros_like(leaf), leaf), step)
    return taken, state._replace(
        damping=jnp.clip(state.damping * factor, rule.minimum, rule.maximum).astype(state.damping.dtype),
        reduction=ratio.astype(state.reduction.dtype),
        rejected=state.rejected + bad,
        kl=jnp.where(bad, 0, state.kl),
    )
