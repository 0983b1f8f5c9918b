"""A posterior in a file: arrays in NumPy's format beside a description in JSON, and no code."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np

from ..model import Model, by_identity
from ..operators.implicit import ImplicitFisher

FORMAT, VERSION = "fisherbook posterior", 1


def save(posterior: Any, path: Any) -> None:
    arrays: list[np.ndarray] = []
    content = _Writer(posterior.whole, arrays).node(posterior)
    header = json.dumps({"format": FORMAT, "version": VERSION, "content": content})
    contents: Any = {"header": np.array(header)} | {f"a{k}": a for k, a in enumerate(arrays)}
    with Path(path).open("wb") as file:
        np.savez(file, **contents)


def load_posterior(path: Any, model: Model, theta: Any = None) -> Any:
    """Read a posterior that `LaplacePosterior.save` wrote.

    Args:
        path: the file.
        model: the model that was passed to `laplace`, the whole one where the posterior is over a part.
        theta: a pytree of the saved parameter's structure, where that is not made of dicts, lists and tuples (an
            equinox module, for instance); its numbers are not read.

    Returns:
        The `LaplacePosterior`, equal in every number.

    Raises:
        ValueError: the file holds no posterior, one of a newer version, or a parameter of another structure.

    Example:
        >>> import numpyro.distributions as dist, tempfile, pathlib
        >>> from fisherbook.laplace import laplace
        >>> model = lambda t: dist.Normal(t["mean"], 1.0)
        >>> posterior = laplace(model, {"mean": jnp.array(1.5)}, jnp.array([1.0, 2.0, 3.0]))
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "mean.posterior"
        >>> posterior.save(path)
        >>> print(load_posterior(path, model).standard_deviations())
        {'mean': Array(0.5, dtype=float64)}

    Derived in the chapter "Laplace posteriors". Source: the format of arrays is that of `numpy.savez`.
    """
    try:
        with Path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            header = json.loads(str(file["header"]))
            arrays = [file[f"a{k}"] for k in range(len(file.files) - 1)]
    except (KeyError, ValueError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} holds no posterior that this package has saved") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path} holds no posterior that this package has saved")
    if header["version"] > VERSION:
        raise ValueError(f"{path} was saved by a newer version of fisherbook: update it")
    return _Reader(by_identity(model), arrays, theta).value(header["content"])


def _ours(cls: type) -> bool:
    return cls.__module__.split(".")[0] == __name__.split(".")[0]


class _Writer:
    def __init__(self, model: Model, arrays: list[np.ndarray]) -> None:
        self.model, self.arrays = model, arrays

    def node(self, value: Any) -> Any:
        """What JSON says about a value; its arrays are put aside."""
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"is": value}
        if isinstance(value, bytes):
            return {"bytes": value.hex()}
        if _ours(type(value)):
            return self._object(value)
        if value is self.model:
            return {"model": True}
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return {"key": self._array(jax.random.key_data(value))}
        if isinstance(value, (jax.Array, np.ndarray, np.generic)):
            return {"array": self._array(value), "numpy": not isinstance(value, jax.Array)}
        if type(value) is dict and all(isinstance(key, (str, int)) for key in value):
            return {"dict": [[key, self.node(item)] for key, item in value.items()]}
        if type(value) in (list, tuple):
            return {type(value).__name__: [self.node(item) for item in value]}
        leaves, tree = jax.tree.flatten(value)
        if jax.tree_util.treedef_is_leaf(tree):
            raise ValueError(
                f"a {type(value).__name__} cannot be saved: only a posterior whose curvature is one of fisherbook's, "
                "over arrays"
            )
        return {"like": [self.node(leaf) for leaf in leaves], "tree": str(tree)}

    def _array(self, value: Any) -> int:
        self.arrays.append(np.asarray(value))
        return len(self.arrays) - 1

    def _object(self, value: Any) -> Any:
        value = value.for_a_file() if isinstance(value, ImplicitFisher) else value
        if dataclasses.is_dataclass(value):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        else:
            fields = value._asdict() if hasattr(value, "_asdict") else dict(vars(value))
        name = f"{type(value).__module__}:{type(value).__qualname__}"
        return {"object": name, "fields": {key: self.node(item) for key, item in fields.items()}}


class _Reader:
    def __init__(self, model: Model, arrays: list[np.ndarray], theta: Any) -> None:
        self.model, self.arrays, self.theta = model, arrays, theta

    def value(self, node: Any) -> Any:
        (kind, content), *_ = node.items()
        match kind:
            case "is":
                return content
            case "model":
                return self.model
            case "bytes":
                return bytes.fromhex(content)
            case "key":
                return jax.random.wrap_key_data(jnp.asarray(self.arrays[content]))
            case "array":
                return self.arrays[content] if node["numpy"] else jnp.asarray(self.arrays[content])
            case "dict":
                return {key: self.value(item) for key, item in content}
            case "list":
                return [self.value(item) for item in content]
            case "tuple":
                return tuple(self.value(item) for item in content)
            case "like":
                return self._like([self.value(item) for item in content], node["tree"])
            case "object":
                return self._object(content, node["fields"])
        raise ValueError(f"a posterior's file has no {kind!r}")

    def _like(self, leaves: list[Any], tree: str) -> Any:
        structure = jax.tree.structure(self.theta)
        if str(structure) != tree:
            found = "pass theta=, a pytree of that structure" if self.theta is None else f"theta has {structure}"
            raise ValueError(f"the posterior's parameter has the structure {tree}: {found}")
        return jax.tree.unflatten(structure, leaves)

    def _object(self, name: str, fields: dict[str, Any]) -> Any:
        module, _, qualified = name.partition(":")
        if module.split(".")[0] != __name__.split(".")[0]:
            raise ValueError(f"a posterior's file may not name {module}")
        cls = getattr(importlib.import_module(module), qualified)
        values = {key: self.value(item) for key, item in fields.items()}
        if issubclass(cls, tuple):
            return cls(**values)
        made = object.__new__(cls)
        for key, item in values.items():
            object.__setattr__(made, key, item)
        return made
