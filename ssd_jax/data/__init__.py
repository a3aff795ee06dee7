"""Captioned images: sources and batch streams."""
