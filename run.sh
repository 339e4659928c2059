#!/usr/bin/env bash
# Sets up the environment and runs `python train.py ARGUMENTS` in it: without arguments, the
# default experiment. Relative paths in ARGUMENTS, and runs/, belong to the folder that it is
# started from.
source "$(dirname "${BASH_SOURCE[0]}")/scripts/env.sh"
exec "$venv/bin/python" "$root/train.py" "$@"
