#!/usr/bin/env bash
# Sets up the environment and runs `python train.py ARGUMENTS` in it: without arguments, the default experiment.
source "$(dirname "${BASH_SOURCE[0]}")/scripts/env.sh"
exec .venv/bin/python train.py "$@"
