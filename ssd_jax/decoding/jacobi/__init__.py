"""Jacobi decoders, which refine the model's own drafts in a window."""
