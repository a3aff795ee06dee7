"""The live page and the server behind it."""
