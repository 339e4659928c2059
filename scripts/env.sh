# Sourced by run.sh and test.sh: an environment of the project's own in .venv, made again when the requirements change.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp=.venv/requirements.sha256
wanted=$(cat requirements.txt constraints.txt | sha256sum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "setting up .venv (once; a few minutes on a slow network)"
    "${PYTHON:-python3}" -m venv --clear .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
    echo "$wanted" >"$stamp"
fi
