"""Decoders that refine the model's own guesses in a window."""
