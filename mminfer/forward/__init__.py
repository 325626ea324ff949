"""The prompt pass and decoding: one loop over the host's own layers, and the cache that it fills."""
