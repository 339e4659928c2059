"""Who takes part in a run; nothing here knows a model."""
