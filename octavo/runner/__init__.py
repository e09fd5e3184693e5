"""Computes: a Batch goes in, a StepResult comes out. What to compute is decided in `octavo.engine`."""
