"""Evaluating the training loss again without disturbing the training."""
