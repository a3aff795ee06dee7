"""Decoders that verify a tree of drafts."""
