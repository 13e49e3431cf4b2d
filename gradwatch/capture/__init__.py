"""Attaching to a live model without leaving a trace on the training."""
