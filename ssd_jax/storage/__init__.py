"""Checkpoints and arrays on disk, written atomically."""
