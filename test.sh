#!/usr/bin/env bash
# Sets up the environment and runs the tests in it, on two cores. Arguments go to pytest, which
# runs in the repository.
source "$(dirname "${BASH_SOURCE[0]}")/scripts/env.sh"
cd "$root"
exec "$venv/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
