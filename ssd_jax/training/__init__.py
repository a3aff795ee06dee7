"""Training of the tokenizer, trunk, heads and drafter with one loop."""
