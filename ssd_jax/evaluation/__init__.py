"""Quality, exactness and redundancy of what decoders generate."""
