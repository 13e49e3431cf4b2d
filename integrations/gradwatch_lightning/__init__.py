"""gradwatch in Lightning: one callback for `lightning` and `pytorch_lightning`."""
