"""Training: one loop for the tokenizer, the trunk, the heads, the drafter."""
