"""Flax modules of the networks, without decoding logic."""
