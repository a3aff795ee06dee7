"""What lies on disk: checkpoints and arrays, written whole or not at all."""
