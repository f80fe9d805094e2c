#!/usr/bin/env bash
# Create .venv-bench: Tersor (editable) and every peer that runs beside torch 2.13 on a CPU. About 2 GB, a few minutes.
# A peer that fails to install is named and left out; the suites skip what they cannot import.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3.11}
venv=${VENV:-.venv-bench}

constraints=()
[ -f constraints.txt ] && constraints=(-c constraints.txt)

[ -d "$venv" ] || "$python" -m venv "$venv" || exit 1
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)

# torch first and pinned: a bare requirement of some peer would otherwise fetch a CUDA build
"${pip[@]}" "${constraints[@]}" torch==2.13.0 setuptools wheel || exit 1

failed=()
while read -r line; do
    requirement=${line%%#*}
    [ -n "${requirement// /}" ] || continue
    "${pip[@]}" "${constraints[@]}" torch==2.13.0 "$requirement" || failed+=("$requirement")
done < bench/requirements.txt
while read -r line; do
    requirement=${line%%#*}
    [ -n "${requirement// /}" ] || continue
    DISABLE_CUDA=1 "${pip[@]}" --no-deps --no-build-isolation "$requirement" || failed+=("$requirement")
done < bench/requirements-nodeps.txt
"${pip[@]}" "${constraints[@]}" --no-deps -e . || failed+=("tersor itself")

if [ ${#failed[@]} -gt 0 ]; then
    printf 'not installed: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "peers are in $venv"
