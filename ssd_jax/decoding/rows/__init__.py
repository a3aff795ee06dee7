"""Decoders that work on several rows of the grid at once."""
