"""The live page: requests that queue and batch, and what serves them."""
