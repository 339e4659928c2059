"""Preference optimisation of language models: the package behind train.py."""
