"""The trace and the diagonal of an operator from products with random signs, and how far they may be off."""

from __future__ import annotations

from typing import Any

import jax

from ..compilation import run


def from_signs(F: Any, what: str, key: jax.Array, draws: int) -> tuple[jax.Array, jax.Array]:
    """The mean of v (F v), or of its sum, over random signs v (Hutchinson, 1990), and the standard error of it."""
    from matfree import stochtrace

    if draws < 2:
        raise ValueError(f"a standard error needs at least 2 draws, got {draws}")
    integrand = {"trace": stochtrace.monte_carlo_trace, "diagonal": stochtrace.monte_carlo_diagonal}[what]()
    sampler = stochtrace.sampler_signs(F.root.flat, num=draws)
    estimate = stochtrace.estimator_monte_carlo_mean_and_sem(integrand, sampler)
    mean, error = run(lambda F, key: estimate(lambda v: F._multiply(v[:, None])[:, 0], key), F, key)
    return F.scale * mean, F.scale * error
