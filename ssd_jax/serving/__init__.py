"""The image server: HTTP API, live page and scheduler."""
