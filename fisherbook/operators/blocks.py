"""A block of the Fisher information as a Kronecker product in its eigenbasis."""

from __future__ import annotations

import hashlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np


class Index:
    """Positions in theta, equal by their numbers, so that they may be a static part of an operator."""

    def __init__(self, at: np.ndarray) -> None:
        self.at = np.asarray(at)
        self.key = self.at.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Index) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:  # by content: `compile_once` tells programs apart by it
        return f"Index({self.at.shape}, {hashlib.sha256(self.key).hexdigest()[:16]})"


class Factor(eqx.Module):
    """A symmetric factor [m, m] and its eigenvectors; a diagonal one is `matrix` [m] without eigenvectors."""

    matrix: jax.Array
    values: jax.Array
    vectors: jax.Array | None

    @staticmethod
    def of(matrix: jax.Array) -> Factor:
        if matrix.ndim == 1:
            return Factor(matrix, matrix, None)
        # the barrier keeps LAPACK's order of columns from reaching back into the products that made the matrix
        values, vectors = jnp.linalg.eigh(jax.lax.optimization_barrier((matrix + matrix.T) / 2))
        return Factor(matrix, jnp.maximum(values, 0), vectors)

    @property
    def diagonal(self) -> jax.Array:
        return self.matrix if self.vectors is None else jnp.diagonal(self.matrix)


class Block(eqx.Module):
    """A kron G for entries `index` [i o] of theta; `values` [i, o] are the eigenvalues, corrected ones for EKFAC.

    A block that is formed whole has the factor a = [1].
    """

    a: Factor
    g: Factor
    values: jax.Array
    corrected: bool = eqx.field(static=True)
    name: str = eqx.field(static=True)
    index: Index = eqx.field(static=True)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def into(self, V: jax.Array) -> jax.Array:
        """V [p, k] in the eigenbasis, [i, o, k]."""
        V = V.reshape(*self.shape, -1)
        V = V if self.a.vectors is None else jnp.einsum("ij,iok->jok", self.a.vectors, V)
        return V if self.g.vectors is None else jnp.einsum("op,iok->ipk", self.g.vectors, V)

    def back(self, W: jax.Array) -> jax.Array:
        """From the eigenbasis: the inverse of `into`."""
        W = W if self.a.vectors is None else jnp.einsum("ji,iok->jok", self.a.vectors, W)
        W = W if self.g.vectors is None else jnp.einsum("po,iok->ipk", self.g.vectors, W)
        return W.reshape(-1, W.shape[-1])

    def diagonal(self) -> jax.Array:
        if not self.corrected:
            return jnp.outer(self.a.diagonal, self.g.diagonal).ravel()
        D = self.values
        D = D if self.a.vectors is None else self.a.vectors**2 @ D
        return (D if self.g.vectors is None else D @ (self.g.vectors**2).T).ravel()


def make_block(A: jax.Array, G: jax.Array, name: str, at: np.ndarray) -> Block:
    """The block A kron G; a vector A is a diagonal factor."""
    a, g = Factor.of(A), Factor.of(G)
    return Block(a, g, jnp.outer(a.values, g.values), False, name, Index(at))
