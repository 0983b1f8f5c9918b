"""Products with the Fisher information over batches that are read again for each of them."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..batches import Batches
from ..compilation import run
from ..law import Law
from ..model import Model, is_traced
from .base import UNKNOWN, Fisher, Vector
from .dense import dense_fisher
from .diagonal import squared_columns, squared_norm
from .low_rank import product
from .streams import Passes, mean_over_rows

OUTSIDE = (
    "cannot stand inside jax.jit, and has no derivative: dense_fisher, kronecker_fisher, low_rank_fisher and "
    "diagonal_fisher read them once"
)
LARGEST = 8192  # the smaller side of R up to which determinants and draws are computed through it


def check_options(rtol: float, max_steps: int | None, preconditioner: Any) -> None:
    if not 0 < rtol < 1:
        raise ValueError(f"rtol is a relative residual, between 0 and 1, got {rtol}")
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    if preconditioner is not None and not (callable(preconditioner) or isinstance(preconditioner, Fisher)):
        raise TypeError(
            f"preconditioner must be a function from [d] to [d] or an operator, got {type(preconditioner).__name__}"
        )


def most_steps(max_steps: int | None, d: int) -> int:
    """Steps after which conjugate gradients give up: what was asked for, or 10 d between 1000 and 10 000."""
    return max_steps or min(max(1000, 10 * d), 10_000)


class StreamedFisher(Fisher):
    """F through products, each of which reads all batches once; not for use inside `jax.jit`.

    The first product traces the model and checks every batch; later ones reuse the programs, and check their answer.
    `solve` runs SciPy's conjugate gradients. Determinants and draws form the matrix, up to 8192 parameters.
    """

    model: Model = eqx.field(static=True)
    batches: Batches = eqx.field(static=True)
    rtol: float = eqx.field(static=True)
    max_steps: int | None = eqx.field(static=True)
    passes: Passes = eqx.field(static=True)
    of: Law
    preconditioner: Any

    def _mean(self, function: Any) -> Any:
        return mean_over_rows(self.model, self.theta, self.batches, self.of, function, self.passes)[1]

    def __matmul__(self, v: Any) -> Any:
        if is_traced(v):
            raise ValueError(f"batches are read by Python: a product over Batches {OUTSIDE}")
        vector = Vector(v, self.theta)
        return vector.back(self.scale * self._multiply(vector.matrix))

    def _multiply(self, V: jax.Array) -> jax.Array:
        value = self._mean(lambda root: run(product, root, V))
        if np.isfinite(V).all() and not np.isfinite(value).all():  # a later pass checks less than the first
            raise ValueError("F v is not finite: a batch that is read again holds other values, or v is too large")
        return value

    def _diagonal(self) -> jax.Array:
        return self._mean(lambda root: run(squared_columns, root))

    def diagonal(self) -> jax.Array:
        """The diagonal [d]."""
        return self.scale * self._diagonal()

    def trace(self) -> jax.Array:
        """The trace, a scalar, exactly."""
        return self.scale * self._mean(lambda root: run(squared_norm, root))

    def _numbers(self) -> list[tuple[str, str]]:  # each would read all batches
        return [("trace", UNKNOWN), ("condition", UNKNOWN)]

    def _solve(self, V: jax.Array, damping: jax.Array) -> jax.Array:
        from scipy.sparse.linalg import LinearOperator, cg

        if is_traced(V, damping):
            raise ValueError(f"batches are read by Python: a solve over Batches {OUTSIDE}")
        damp, dtype = np.asarray(damping), np.asarray(V).dtype
        apply = lambda v: np.asarray(self._multiply(jnp.asarray(v)[:, None]))[:, 0] + damp * v
        A, before = LinearOperator((self.d, self.d), matvec=apply, dtype=dtype), None
        if self.preconditioner is not None:
            call = self.preconditioner.solve if isinstance(self.preconditioner, Fisher) else self.preconditioner
            before = LinearOperator((self.d, self.d), matvec=lambda r: np.asarray(call(jnp.asarray(r))), dtype=dtype)
        steps = most_steps(self.max_steps, self.d)

        def solve(v: np.ndarray) -> np.ndarray:
            w, failed = cg(A, v, rtol=self.rtol, atol=0.0, maxiter=steps, M=before)
            if failed or not np.isfinite(w).all():
                raise ValueError(
                    f"conjugate gradients did not converge in {steps} steps: pass damping > 0, a preconditioner=, or "
                    "more max_steps="
                )
            return w

        if not (damp > 0).all():  # a null direction of F is visible in a vector that has a part in it
            z = np.random.default_rng(0).standard_normal(self.d)
            if np.linalg.norm(solve(apply(z)) - z) > 1e-3 * np.linalg.norm(z):
                raise ValueError("F is singular to working precision: pass damping > 0")
        return jnp.asarray(np.stack([solve(v) for v in np.asarray(V).T], 1))

    def _matrix(self) -> Any:
        if self.d > LARGEST:
            raise ValueError(
                f"the determinant and draws of products over batches need at most {LARGEST} parameters, not {self.d}: "
                "use low_rank_fisher, kronecker_fisher or diagonal_fisher"
            )
        return dense_fisher(self.model, self.theta, self.batches, law=self.of)

    def _logdet(self, damping: jax.Array) -> jax.Array:
        return self._matrix()._logdet(damping)

    def _inverse_root(self, white: jax.Array, damping: jax.Array) -> jax.Array:
        return self._matrix()._inverse_root(white, damping)
