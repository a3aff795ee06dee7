"""What decoding and training cost: estimated, compiled, measured."""
