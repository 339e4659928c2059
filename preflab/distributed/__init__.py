"""The processes of a run: launching, process groups, signals and the console. No models."""
