"""One module per checkpoint family: sizes, prompts, grid and guidance."""
