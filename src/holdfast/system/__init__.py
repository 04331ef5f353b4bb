"""What a run asks of the machine: files, processes, progress, interruption."""
