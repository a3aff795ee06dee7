"""Decoders and the loop that runs them."""
