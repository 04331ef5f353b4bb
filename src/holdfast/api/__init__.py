"""The contracts of holdfast: open this to extend it."""
