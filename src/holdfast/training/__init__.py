"""The continual trainer and all that belongs to one stage of training."""
