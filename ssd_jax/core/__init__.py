"""Shared types, settings and errors, without computation."""
