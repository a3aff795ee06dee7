"""Conversion of published PyTorch checkpoints to model folders."""
