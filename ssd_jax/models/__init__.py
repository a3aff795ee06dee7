"""Networks: linen leaves without decoding logic."""
