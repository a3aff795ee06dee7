"""Decoders and the engine that runs them."""
