"""Tensor arithmetic that knows no training loop."""
