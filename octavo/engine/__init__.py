"""The engine decides: which request computes how many tokens in a step, and where their K/V lives. No torch."""
