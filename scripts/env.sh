# Sourced by run.sh and test.sh. Defines `root`, the repository, and `venv`, its environment,
# which is set up when it is missing, when the requirements have changed, or when PYTHON names
# another version. The current folder stays the caller's.
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
requirements=$(cat "$root"/requirements.txt "$root"/requirements/*.txt "$root"/constraints.txt)

fail() {
    echo "error: $*" >&2
    exit 2
}

# Old versions of Python have to understand it. It asks for the interpreter that environments are
# made from, because PYTHON, or python3 of an activated environment, may be the one that is
# replaced.
ask='
import sys
base = getattr(sys, "_base_executable", sys.executable)
print("%d.%d %s" % (sys.version_info[0], sys.version_info[1], base))
'

# Defines `version` (such as 3.11) and `base`, the interpreter that makes the environment.
choose_python() {
    local python=${PYTHON:-python3} answer accepted
    accepted="PrefLab runs on Python 3.11, 3.12 and 3.13"
    accepted="$accepted; name one of these, for example PYTHON=python3.12 bash $0"
    answer=$("$python" -c "$ask" 2>/dev/null) || fail "$python does not start; $accepted"
    read -r version base <<<"$answer"
    case $version in
    3.11 | 3.12 | 3.13) ;;
    *) fail "$python is Python $version; $accepted" ;;
    esac
}

# A complete environment holds what it was installed from; these files are written last.
is_ready() {
    [ -x "$venv/bin/python" ] || return 1
    [ "$(cat "$venv/installed-requirements" 2>/dev/null)" = "$requirements" ] || return 1
    [ -z "${PYTHON:-}" ] || [ "$(cat "$venv/installed-version" 2>/dev/null)" = "$version" ]
}

# Python's flock, because macOS has no such command. The lock belongs to the open file 9, so it
# lasts as long as the shell that opened it, and what that shell starts.
lock='
import fcntl, signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("waiting for another command that sets up .venv", flush=True)
    fcntl.flock(9, fcntl.LOCK_EX)
except OSError as error:
    print(f"no locks here ({error}): start no second command before .venv is set up", flush=True)
'

# Without a network the whole installation would retry for minutes, so it is first tried to
# connect three times, for one small package. A slow answer, or a base without pip, is no reason
# to stop.
check_network() {
    local unreachable='NewConnectionError|ConnectTimeoutError|NameResolutionError|ProxyError'
    "$base" -m pip download --no-deps --timeout 5 --retries 2 --dest "$venv.probe" \
        "$(grep '^tqdm==' "$root/requirements/base.txt")" >"$venv.log" 2>&1 || true
    rm -rf "$venv.probe"
    if grep -Eq "Retry\(total=0.*($unreachable)" "$venv.log"; then
        fail "no package index can be reached (pip's messages are in $venv.log); connect to a" \
            "network, or set PIP_INDEX_URL to a mirror, or PIP_NO_INDEX=1 and PIP_FIND_LINKS to a" \
            "folder of wheels"
    fi
}

# A failure leaves the environment that was there before, or none.
restore() {
    rm -rf "$venv"
    [ ! -d "$venv.old" ] || mv "$venv.old" "$venv"
}

set_up() (
    trap 'exit 130' INT # also where a command takes Ctrl-C and ends with an error that is passed over
    exec 9>"$venv.lock"
    "$base" -c "$lock"
    if is_ready; then exit 0; fi
    echo "setting up .venv with Python $version (once; a few minutes on a slow network)"
    check_network
    trap restore EXIT
    if [ -e "$venv/installed-requirements" ]; then
        rm -rf "$venv.old"
        mv "$venv" "$venv.old"
    fi
    rm -rf "$venv"
    "$base" -m venv "$venv" ||
        fail "$base makes no environment; on Debian and Ubuntu install python$version-venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        -r "$root/requirements.txt" -c "$root/constraints.txt" ||
        fail "pip could not install the requirements (its messages are above); .venv is as it was"
    echo "$version" >"$venv/installed-version"
    echo "$requirements" >"$venv/installed-requirements"
    trap - EXIT
    rm -rf "$venv.old" "$venv.log"
)

if [ -n "${PYTHON:-}" ]; then choose_python; fi
if ! is_ready; then
    choose_python
    set_up
fi
