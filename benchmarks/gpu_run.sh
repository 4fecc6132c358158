#!/usr/bin/env bash
# The benchmark of a machine with a GPU, which needs torch and transformers and may lack diffusers and a network:
#
#     bash benchmarks/gpu_run.sh [arguments of benchmarks.gpu]
#
# OUT     folder for gpu.json, which is written after each variant, and gpu.log (out/gpu)
# WHEELS  folder with the wheels that benchmarks/gpu_wheels.sh collects (out/gpu-wheels, if it is there); without one,
#         what is missing comes from the package index
# SITE    folder into which what is missing is installed, nothing else of the machine changes (a temporary one)
# PYTHON  the interpreter that has torch (python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
out=${OUT:-out/gpu}
wheels=${WHEELS:-out/gpu-wheels}
site=${SITE:-${TMPDIR:-/tmp}/flux-gpu-site}
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
mkdir -p "$out"

if ! "$python" -c 'import diffusers, importlib_metadata; assert diffusers.__version__.startswith("0.42.")' 2>/dev/null; then
    # Their own needs come with transformers, but for those listed; pip would replace torch to satisfy the rest.
    install=("$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --upgrade --target "$site")
    if [ -d "$wheels" ]; then
        "${install[@]}" --no-index "$wheels"/*.whl
    else
        "${install[@]}" --constraint constraints.txt --requirement benchmarks/gpu_needs.txt
    fi
fi

# In place of this shell, so that a signal to stop reaches it.
exec "$python" -m benchmarks.gpu --out "$out/gpu.json" "$@"
