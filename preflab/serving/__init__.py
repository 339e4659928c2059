"""Samples of a model that a server holds."""
