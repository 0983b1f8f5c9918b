"""The Fisher information as a product: never formed, solved by conjugate gradients or in the space of its rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ..batches import Batches
from ..compilation import hide_constants, run
from ..law import Exact, Law
from ..model import Model, by_identity, flatten, is_traced, require
from ..root import CAP, Root, dense_rows, linear_map, linearize, make_root, residuals, row_shape, transpose
from . import layered
from .base import Fisher, is_like
from .dense import gram_of_columns, law_name
from .diagonal import squared_columns, squared_norm
from .estimates import from_signs
from .factor import cholesky
from .row_blocks import over_blocks
from .streamed import LARGEST, StreamedFisher, check_options, most_steps
from .streams import Passes
from .woodbury import Thin

SMALL = 4096  # parameters up to which an undamped solve forms F
REFRESH = 50  # steps of conjugate gradients after which the residual is computed anew (Shewchuk 1994, appendix B2)
HELD = "_held"  # the attribute, and no field, of an operator that was made in a trace: its linearised R
UNIT = 1e-12  # of a solution inside lineax, which would judge its changes by the size of v: the residual alone decides


class ImplicitFisher(Fisher):
    """F through its products R^T (R v), with R linearised once.

    `solve` works in the space of R's rows where these are fewer than the parameters and damping is positive. Otherwise
    it runs conjugate gradients to the relative residual `rtol`; without damping it forms F, up to 4096 parameters.
    Determinants and draws go through the smaller side of R, up to 8192.
    """

    root: Root
    kept: list[jax.Array] | None
    rtol: float = eqx.field(static=True)
    max_steps: int | None = eqx.field(static=True)
    preconditioner: Any
    form: Any = eqx.field(static=True)

    def _multiply(self, V: jax.Array) -> jax.Array:
        return self._product()(V)

    def _run(self, function: Callable[..., Any], *args: jax.Array) -> Any:
        if hasattr(self, HELD):  # with this very object: its leaves do not hold the linearised map
            return jax.jit(lambda *args: function(self, *args))(*args)
        return super()._run(function, *args)

    def __matmul__(self, v: Any) -> Any:
        types = lambda tree: [jnp.result_type(leaf) for leaf in jax.tree.leaves(tree)]
        if not (hasattr(self, HELD) and is_like(v, self.theta) and types(v) == types(self.theta)):
            return super().__matmul__(v)
        # leaf by leaf: no vector of all parameters is written on the way
        linear = getattr(self, HELD)
        product = transpose(linear, self.theta)(linear(hide_constants(jax.tree.map(jnp.asarray, v))))
        return jax.tree.map(lambda a: (self.scale * a).astype(a.dtype), product)

    def _linear(self) -> Callable[[jax.Array], jax.Array]:
        """v [d] -> R v, from what is kept of it where it is."""
        if not hasattr(self, HELD) and self.kept is None:
            return linearize(self.root)
        linear = getattr(self, HELD) if hasattr(self, HELD) else jax.tree.unflatten(self.form, self.kept)
        return lambda v: linear(self.root.unravel(v))

    def for_a_file(self) -> ImplicitFisher:
        """Without the linearised model, which is made anew from the data that are kept."""
        return dataclasses.replace(self, kept=None, form=None)

    def _product(self) -> Callable[[jax.Array], jax.Array]:
        """V [d, k] -> R^T R V, linearised once however often it is called."""
        flat, held = self.root.flat, hasattr(self, HELD) or self.kept is not None
        if held or (big := residuals(self.root)) <= CAP:
            linear = self._linear()
            one = lambda v: transpose(linear, flat)(linear(v))
        else:

            def block(part: Root, v: jax.Array) -> jax.Array:
                linear = linearize(part)
                return transpose(linear, flat)(linear(v))

            one = lambda v: over_blocks(self.root, lambda part: block(part, v), big)
        return lambda V: one(V[:, 0])[:, None] if V.shape[1] == 1 else jax.vmap(one, 1, 1)(V)

    def _diagonal(self) -> jax.Array:
        return squared_columns(self.root).astype(self.dtype)

    def trace(self) -> jax.Array:
        """The trace, a scalar, exactly."""
        return run(lambda F: F.scale * squared_norm(F.root).astype(F.dtype), self)

    @property
    def rows(self) -> int:
        return self.root.n * row_shape(self.root)

    @property
    def _columns_fit(self) -> bool:
        return self.rows < self.d and self.rows <= LARGEST and self.rows * self.d <= 4 * CAP

    def _solve(self, V: jax.Array, damping: jax.Array) -> jax.Array:
        few, thin = self.rows < self.d and self.rows <= LARGEST, self._columns_fit
        # the Gram matrix squares the condition number, which single precision does not forgive
        if few and damping.ndim == 0 and not (thin and V.dtype == jnp.float32):
            w = self._run(lambda F, V, damping: F._in_row_space(V, damping), V, self._positive(damping))
            hint = "F + damping is singular to working precision: pass more damping"
            return require(jnp.all(jnp.isfinite(w)), w, hint)
        if thin:
            return run(lambda F, V, damping: F._thin(damping).solve(V), self, V, self._positive(damping))
        if self.d <= SMALL and not is_traced(damping, V, self.root) and not bool(jnp.all(damping > 0)):
            return self._by_matrix(V, damping)
        w, error, probe = self._run(lambda F, V, damping: F._conjugate_gradients(V, damping), V, damping)
        tolerance = max(10 * self.rtol, 1e3 * float(jnp.finfo(V.dtype).eps))
        w = require(probe <= 1e-3, w, lambda: self._stuck("F is singular to working precision", probe))
        return require(error <= tolerance, w, lambda: self._stuck("conjugate gradients did not converge", error))

    def _stuck(self, what: str, size: Any) -> str:
        number = "" if is_traced(size) else f" (relative error {float(size):.1e})"
        return f"{what}{number}: pass damping > 0, a preconditioner=, or more max_steps="

    def _positive(self, damping: jax.Array) -> jax.Array:
        hint = (
            f"F has {self.rows} rows and {self.d} parameters, so it is singular: pass damping > 0 "
            "(the step then lies in the space of the rows)"
        )
        return require(jnp.all(damping > 0), damping, hint)

    def _by_matrix(self, V: jax.Array, damping: jax.Array) -> jax.Array:
        """Without damping a matrix tells at once whether F is singular, conjugate gradients only in the end."""
        F = run(gram_of_columns, self.root)
        factor = cholesky(F + jnp.diag(jnp.broadcast_to(damping, self.d)), lambda: self.names)
        return jax.scipy.linalg.cho_solve((factor, True), V)

    def _conjugate_gradients(self, V: jax.Array, damping: jax.Array) -> tuple[jax.Array, ...]:
        import lineax as lx

        product = self._product()
        one = lambda v: product(v[:, None])[:, 0] + damping * v
        form = jax.ShapeDtypeStruct((self.d,), V.dtype)
        operator = lx.FunctionLinearOperator(lambda v: one(v / UNIT), form, lx.positive_semidefinite_tag)
        steps = most_steps(self.max_steps, self.d)
        options = {}
        if self.preconditioner is not None:
            before = self.preconditioner
            call = before.solve if isinstance(before, Fisher) else before
            options["preconditioner"] = lx.FunctionLinearOperator(call, form, lx.positive_semidefinite_tag)

        def solve(v: jax.Array) -> jax.Array:
            # by default lineax compares entry with entry, and divides by the zeros of v
            size = jnp.linalg.norm(jax.lax.stop_gradient(v))
            solver = lx.CG(0.0, self.rtol * size, jnp.linalg.norm, stabilise_every=REFRESH, max_steps=steps)
            start = hide_constants(jnp.zeros_like(v))
            return lx.linear_solve(operator, v, solver, options={**options, "y0": start}, throw=False).value / UNIT

        def relative(w: jax.Array, v: jax.Array) -> jax.Array:
            return jnp.linalg.norm(one(w) - v) / jnp.maximum(jnp.linalg.norm(v), jnp.finfo(v.dtype).tiny)

        W = jax.lax.map(solve, V.T)
        error = jnp.max(jax.vmap(relative)(W, V.T))
        # without damping: a null direction of F is invisible in W, and visible in a vector that has a part in it
        z = jax.random.normal(jax.random.key(0), (self.d,), V.dtype)
        Fz = one(z)
        undamped = jnp.min(damping) <= jnp.finfo(V.dtype).eps * jnp.linalg.norm(Fz) / jnp.linalg.norm(z)
        lost = lambda: jnp.linalg.norm(solve(Fz) - z) / jnp.linalg.norm(z)
        return W.T, error, jax.lax.cond(undamped, lost, lambda: jnp.zeros((), V.dtype))

    def _in_row_space(self, V: jax.Array, damping: jax.Array) -> jax.Array:
        """(V - R^T (R R^T + damping)^-1 R V) / damping, corrected once by its own residual."""
        flat, linear = self.root.flat, self._linear()
        back, form = transpose(linear, flat), jax.eval_shape(linear, flat)
        layers = layered.layers_of(self.root)
        if layers is not None and not layered.shared(layers) and layered.thin(self.root, layers) <= 4 * CAP:
            K = layered.gram(self.root, layers)
        elif self.rows * self.d <= CAP:
            rows = dense_rows(self.root).reshape(-1, self.d)
            K = rows @ rows.T
        else:  # R R^T a few columns at a time
            column = lambda e: linear(back(e.reshape(form.shape))).ravel()
            K = jax.lax.map(column, jnp.eye(self.rows, dtype=form.dtype), batch_size=max(1, CAP // (4 * self.d)))
        factor = jax.scipy.linalg.cho_factor(K + damping * jnp.eye(len(K), dtype=K.dtype), lower=True)

        def inverse(v: jax.Array) -> jax.Array:
            u = linear(v)
            return (v - back(jax.scipy.linalg.cho_solve(factor, u.ravel()).reshape(u.shape))) / damping

        def solve(v: jax.Array) -> jax.Array:
            w = inverse(v)
            return w + inverse(v - back(linear(w)) - damping * w)

        return jax.vmap(solve, 1, 1)(V)

    def _thin(self, damping: jax.Array) -> Thin:
        return Thin.of(dense_rows(self.root).reshape(-1, self.d).T, damping)

    def _factor(self, damping: jax.Array) -> jax.Array:
        if self.d > LARGEST:
            raise ValueError(
                f"the determinant and draws of an implicit Fisher information need at most {LARGEST} rows or "
                f"parameters, and {4 * CAP} entries of R, not {self.rows} rows and {self.d} parameters: use "
                "low_rank_fisher, kronecker_fisher or diagonal_fisher"
            )
        M = run(lambda F: F._multiply(jnp.eye(F.d, dtype=F.dtype)), self)
        return cholesky(M + damping * jnp.eye(self.d, dtype=M.dtype), lambda: self.names)

    def _logdet(self, damping: jax.Array) -> jax.Array:
        if self._columns_fit:
            return run(lambda F, damping: F._thin(damping).logdet(), self, self._positive(damping))
        return 2 * jnp.sum(jnp.log(jnp.diagonal(self._factor(damping))))

    def _inverse_root(self, white: jax.Array, damping: jax.Array) -> jax.Array:
        if self._columns_fit:
            return run(
                lambda F, white, damping: F._thin(damping).inverse_root(white), self, white, self._positive(damping)
            )
        return jax.scipy.linalg.solve_triangular(self._factor(damping), white, lower=True, trans=1)

    def trace_estimate(self, key: jax.Array, draws: int = 30) -> tuple[jax.Array, jax.Array]:
        """The trace from random signs, at the cost of `draws` products, and the standard error of that estimate."""
        return from_signs(self, "trace", key, draws)

    def diagonal_estimate(self, key: jax.Array, draws: int = 30) -> tuple[jax.Array, jax.Array]:
        """The diagonal [d] from random signs, at the cost of `draws` products, and its standard errors [d]."""
        return from_signs(self, "diagonal", key, draws)


def implicit_fisher(
    model: Model,
    theta: Any,
    x: Any = None,
    *,
    law: Law = Exact(),  # noqa: B008
    rtol: float = 1e-8,
    max_steps: int | None = None,
    preconditioner: Any = None,
) -> ImplicitFisher | StreamedFisher:
    r"""Represent the Fisher information by its products, :math:`F v = R^\top (R v)`: one push forward, one pull back.

    Inputs are taken in blocks where the linearised model would hold more than 2^26 scalars.

    Args:
        model: `model(theta)` or `model(theta, x)`, a distribution.
        theta: parameter pytree with d scalars, interior to its domain; units u.
        x: inputs with leading axis n, or `Batches` of them, for a conditional model; F is the mean over them.
        law: `Exact()`, `MonteCarlo(key, draws)` with error O(1/sqrt(draws)), or `Data(y)`, the empirical Fisher.
        rtol: relative residual at which conjugate gradients stop; in float32 no less than 1e-6 can be reached.
        max_steps: most conjugate gradient steps, by default 10 d, but between 1000 and 10 000.
        preconditioner: approximate inverse of F + damping: a function from [d] to [d], or another operator, whose
            `solve` is used.

    Returns:
        An operator of shape [d, d] in 1/u^2.

    Raises:
        ValueError: as `score_covariance`; a solve that does not converge, or whose F is singular and undamped.

    Example:
        >>> import numpyro.distributions as dist
        >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
        >>> F = implicit_fisher(lambda t, x: dist.Normal(x @ t, 1.0), jnp.zeros(2), x)
        >>> print(F @ jnp.array([1.0, 0.0]))  # the first column of X^T X / n
        [1. 1.]

    Derived in the chapter "Fisher at scale". Source: Schraudolph (2002), section 3; Martens (2020), section 8.
    """
    check_options(rtol, max_steps, preconditioner)
    model, (flat, unravel) = by_identity(model), flatten(theta)
    rtol = max(rtol, 10 * float(jnp.finfo(flat.dtype).eps))
    one, name = jnp.ones((), flat.dtype), law_name(law)
    if isinstance(x, Batches):
        return StreamedFisher(unravel(flat), one, name, model, x, rtol, max_steps, Passes(), law, preconditioner)
    root = make_root(model, theta, x, law=law)
    kept, form = _linearized(root) if residuals(root) <= CAP else (None, None)
    if kept is None or not is_traced(root):
        return ImplicitFisher(root.theta, one, name, root, kept, rtol, max_steps, preconditioner, form)
    # In a trace the linearised map stays beside the fields, for loops over products in that trace. In them two
    # operators would differ in structure, each map being a program of its own, and `jax.lax.cond` could not choose.
    F = ImplicitFisher(root.theta, one, name, root, None, rtol, max_steps, preconditioner, None)
    object.__setattr__(F, HELD, jax.tree.unflatten(form, kept))
    return F


def _linearized(root: Root) -> tuple[list[jax.Array], Any]:
    """The leaves and the structure of the linearised R."""
    forms: list[Any] = []

    def parts(r: Root) -> list[jax.Array]:
        leaves, tree = jax.tree.flatten(linear_map(r))
        forms.append(tree)
        return leaves

    kept = run(parts, root)
    return kept, forms[-1]
