"""What makes the things that are shipped: the demo model, its evaluation, enlarged checkpoints."""
