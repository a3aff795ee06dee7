"""Pipelines: loaded models that generate images."""
