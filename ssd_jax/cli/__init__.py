"""Bodies of the command lines."""
