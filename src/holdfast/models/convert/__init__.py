"""Convert checkpoints that have no class in transformers."""
