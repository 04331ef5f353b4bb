"""What leaves a run: exports, model cards and a server."""
