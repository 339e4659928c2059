#!/usr/bin/env bash
# Tests and measures everything on one GPU in at most nine minutes; see benchmarks/gpu.py, which
# gets the arguments. The packages have to be there already: those of .venv if the repository has
# one, otherwise those of python3, or of PYTHON.
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$root/.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi
exec "$PYTHON" "$root/benchmarks/gpu.py" "$@"
