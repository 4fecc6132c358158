# The service with everything that it runs on. CUDA by default; for a machine without GPUs:
#   docker build --build-arg VARIANT=cpu -t flux-magcache-serve:0.1.0-cpu .
# Both builds install the releases in constraints.txt, with the Python that they are tested with.

FROM python:3.11.14-slim-bookworm AS build
ARG VARIANT=cuda
# Optional dependencies of pyproject.toml: otlp, and for CUDA also gpu, unless others are named here.
ARG EXTRAS
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /opt/flux
# The dependencies first: a layer that changes only with them.
COPY pyproject.toml constraints.txt ./
# Torch for CPUs comes from an index of its own, and alone: were that one of several, pip would take the CUDA build, five
# times as large, whenever it does not answer.
RUN case "$VARIANT" in \
        cuda) extras=otlp,gpu ;; \
        cpu) extras=otlp; pip install --no-deps -c constraints.txt torch --index-url https://download.pytorch.org/whl/cpu ;; \
        *) echo "VARIANT is '$VARIANT'; choose cuda or cpu" >&2; exit 2 ;; \
    esac \
    && python -c 'import sys, tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*p["dependencies"], *sum(map(p["optional-dependencies"].get, sys.argv[1].split(",")), []), sep="\n")' \
        "${EXTRAS:-$extras}" > /tmp/requirements.txt \
    && pip install -c constraints.txt -r /tmp/requirements.txt
COPY . .
# Editable, and copied to the same path below: what is imported is what lies beside deployments/ and models/.
RUN pip install --no-deps -e . && python -m compileall -q app magcache_core

FROM python:3.11.14-slim-bookworm
# wget is what KubeRay's readiness probe runs; bash, its other need, comes with Debian. gcc is for `compile: true`: Triton
# builds the code that launches its kernels when it makes them.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc=4:12.2.0-* libc6-dev=2.36-* wget=1.21.3-* \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --user-group --no-create-home --home-dir /tmp flux
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/flux /opt/flux
WORKDIR /opt/flux
# Everything below works on a read-only root: what is written goes to /tmp and to HF_HOME, which are volumes there.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/flux \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    HF_HOME=/tmp/huggingface \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=app.api.proxy_guard:middlewares \
    RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S=0.3 \
    RAY_core_worker_rpc_server_reconnect_timeout_base_s=0 \
    RAY_grpc_client_check_connection_status_interval_milliseconds=100 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
EXPOSE 8000
HEALTHCHECK --start-period=10m --interval=15s --timeout=10s --retries=3 \
    CMD ["wget", "--tries=1", "--timeout=8", "-q", "-O", "/dev/null", "http://127.0.0.1:8000/health"]
# Finishes its requests on SIGTERM: give `docker stop` the time, with --time above drain_seconds.
CMD ["python", "-m", "app.serve", "deployments/flux-tiny.yaml"]
