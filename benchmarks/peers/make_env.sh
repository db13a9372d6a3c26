#!/bin/sh
# Makes a peer's own environment: benchmarks/peers/make_env.sh aimet|torch-pruning
set -eu
here=$(cd "$(dirname "$0")" && pwd)
name=${1:?usage: make_env.sh aimet|torch-pruning}
requirements=$here/requirements-$name.txt
test -f "$requirements" || { echo "no $requirements" >&2; exit 2; }
"${PYTHON:-python3}" -m venv "$here/.venv-$name"
"$here/.venv-$name/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
echo "$here/.venv-$name/bin/python"
