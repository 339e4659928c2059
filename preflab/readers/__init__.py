"""Datasets as records: files and hub datasets, read, checked and paired; no tokens, no tensors."""
