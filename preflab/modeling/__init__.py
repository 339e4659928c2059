"""Models that score and write tokens, and where they live; nothing here knows a loss."""
