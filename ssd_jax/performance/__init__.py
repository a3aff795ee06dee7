"""Cost of decoding and training: estimated, compiled and measured."""
