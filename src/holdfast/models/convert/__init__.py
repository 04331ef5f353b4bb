"""Convert checkpoints without a native transformers class."""
