"""Octavo's version, for whoever tells it; `octavo.__version__` is the same."""

__version__ = "0.1.0"
