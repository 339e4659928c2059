"""The config: its keys, the command line, the identity of a run, its folder."""
