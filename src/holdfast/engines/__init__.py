"""How engines lay out parameters, gradients and optimizer state among processes."""
