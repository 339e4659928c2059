"""What a step needs: losses of a batch, checkpoints, metrics."""
