"""The continual trainer, and everything else that one stage of training needs."""
