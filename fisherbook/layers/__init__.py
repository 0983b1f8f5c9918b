"""The linear layers of a JAX function: where a parameter enters linearly, found by tracing it.

There the Jacobian of the outputs is (activation) x (backward signal), and needs no pass for each parameter. Each file
is one step on the way: the program (`tracing`), the places where parameters enter (`sites`), layers with their biases
and shared weights (`layer`), what was found (`report`).
"""

from .layer import Layer, jacobian_of, leaf_names
from .report import Layers, Missing, find_layers, leaf_sizes, linear_layers

__all__ = ["Layer", "Layers", "Missing", "find_layers", "jacobian_of", "leaf_names", "leaf_sizes", "linear_layers"]
