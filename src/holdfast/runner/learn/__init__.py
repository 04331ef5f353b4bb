"""Learn what a user gives, month after month: the data, the settings that fit them, and the run."""
