"""Make a run again without a task or rows: a sibling is built from what never saw them, and takes its place."""
