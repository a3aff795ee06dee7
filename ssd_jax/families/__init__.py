"""One file per checkpoint family: sizes, prompt, grid, guidance, name table."""
