"""The stage loop of a run."""
