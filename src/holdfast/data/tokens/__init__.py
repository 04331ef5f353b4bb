"""Token files: texts as one array of tokens on disk."""
