"""What the training forwards of a sampled step show."""
