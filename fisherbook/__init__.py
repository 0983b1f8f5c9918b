"""Fisher information, computed three independent ways."""

__version__ = "0.1.0"
