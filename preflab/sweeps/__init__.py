"""Many runs from one command: grids, runs side by side, searches."""
