#!/usr/bin/env bash
# Run benchmarks/gpu_run.sh at tiny scale on this CPU, in an environment like that of the GPU machine it is meant for:
# torch 2.11, transformers 5.17 and no Ray, pydantic or diffusers. `make gpu-try` does this.
#
#     bash benchmarks/gpu_try.sh [arguments of benchmarks.gpu]
#
# ENV     folder for that environment, made when it is not there (out/gpu-env; torch's build for CUDA takes 5 GB)
# PYTHON  the interpreter to make it with (python3.12 or python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

environment=${ENV:-out/gpu-env}
if [ ! -x "$environment/bin/python" ]; then
    base=${PYTHON:-$(python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null || command -v python3)}
    "$base" -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check \
        torch==2.11.0 transformers==5.17.0 sentencepiece pillow requests
    # Something brings it along, and the GPU machine has none.
    "$environment/bin/python" -m pip uninstall --quiet --yes pydantic pydantic-core
fi
"$environment/bin/python" - <<'CHECK'
import importlib.util, torch, transformers
there = [name for name in ("ray", "pydantic", "diffusers") if importlib.util.find_spec(name)]
assert not there, f"{there} should not be in this environment: remove it, and it is made anew"
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
CHECK

export PYTHON="$environment/bin/python"
[ -d out/gpu-wheels ] || bash benchmarks/gpu_wheels.sh
SITE=$(mktemp -d)
trap 'rm -rf "$SITE"' EXIT
export SITE OUT=${OUT:-out/gpu-try} WHEELS=out/gpu-wheels
# A GPU's compiler writes Triton, which a CPU cannot run; its C++ would take minutes (--compiler inductor writes that).
bash benchmarks/gpu_run.sh --scale tiny --device cpu --size 64 --small 32 --text-tokens 16 --repeats 1 \
    --compiler aot_eager --budget-s 900 --variant-s 600 "$@"
