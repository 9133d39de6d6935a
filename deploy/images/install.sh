#!/bin/sh
# Installs kvpilot into a virtual environment of its own. The images' build files run it, and so do the tests.
#
#   install.sh dependencies controller|worker PREFIX    what the role needs, at the versions of its lock file
#   install.sh program SOURCE PREFIX                    kvpilot itself, from a checkout
#
# Environment, for the worker's dependencies:
#   TORCH        requirement of the build to install (default: torch at the version of worker.txt)
#   TORCH_INDEX  a further package index with builds of it, such as PyTorch's for the CPU, whose versions (2.13.0+cpu)
#                win over the usual index's (2.13.0, for Linux CUDA's); empty: the usual one alone
set -eu

here=$(cd "$(dirname "$0")" && pwd)
build_backend="setuptools==80.9.0"

pip() {
    "$prefix/bin/python" -m pip --disable-pip-version-check --no-input "$@"
}

dependencies() {
    role=$1 prefix=$2
    case $role in
        controller | worker) ;;
        *) echo "role '$role': expected controller or worker" >&2; exit 2 ;;
    esac
    [ -x "$prefix/bin/python" ] || "${PYTHON:-python3}" -m venv "$prefix"
    if [ "$role" = worker ]; then
        torch=${TORCH:-torch==$(sed -n 's/^# torch==//p' "$here/worker.txt")}
        # With its own dependencies: CUDA's libraries differ from build to build. What the lock names stays as there.
        pip install --quiet --constraint "$here/worker.txt" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$torch"
    fi
    pip install --quiet --no-deps --requirement "$here/$role.txt"
    # The lock was made with one Python: another may need packages that it does not name.
    pip check
}

program() {
    source=$1 prefix=$2
    backend=$(mktemp -d)
    pip install --quiet --no-deps --target "$backend" "$build_backend"
    PYTHONPATH=$backend pip install --quiet --no-deps --no-build-isolation "$source"
    rm -r "$backend"
}

command=${1:-}
case $command in
    dependencies | program) ;;
    *) echo "command '$command': expected dependencies or program" >&2; exit 2 ;;
esac
[ $# -eq 3 ] || { echo "$command: expected two arguments, got $(($# - 1))" >&2; exit 2; }
shift
"$command" "$@"
