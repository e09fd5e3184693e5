"""Weights stored in fewer bits, and how to read them."""
