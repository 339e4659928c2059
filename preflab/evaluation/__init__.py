"""Held-out losses, samples and win rates."""
