"""Studies: a question about several losses in one file, the runs that answer it, and the answer."""
