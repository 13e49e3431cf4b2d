"""gradwatch in the Hugging Face Trainer: one callback."""
