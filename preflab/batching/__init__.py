"""Prompts and responses as batches of token rows; nothing here knows a loss or a rank."""
