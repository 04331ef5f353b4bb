"""A run on disk: written, read back and judged."""
