#!/usr/bin/env bash
# Collect the wheels that a machine with torch and transformers lacks for benchmarks/gpu_run.sh (6 MB, pure Python):
#
#     bash benchmarks/gpu_wheels.sh [folder]        (out/gpu-wheels, which git ignores)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-out/gpu-wheels}
rm -rf "$folder"
"${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --dest "$folder" --constraint constraints.txt --requirement benchmarks/gpu_needs.txt
du -sh "$folder"
