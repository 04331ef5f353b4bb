# holdfast in a container, for CPUs (the default) and for NVIDIA GPUs:
#   docker build --tag holdfast:cpu .
#   docker build --tag holdfast:cuda --target cuda .
#   docker run --rm --gpus all --shm-size 8g --volume "$PWD:/workspace" holdfast:cuda run run.yaml --processes 8

FROM python:3.12-slim AS build
WORKDIR /source
COPY . .
RUN pip install --no-cache-dir build==1.6.1 && python -m build --wheel --outdir /wheels

FROM python:3.12-slim AS base
# Triton compiles its launchers with the machine's C compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 holdfast \
    && install --directory --owner holdfast /workspace
ENV PYTHONUNBUFFERED=1 HF_HOME=/home/holdfast/.cache/huggingface
COPY constraints.txt /tmp/constraints.txt
COPY --from=build /wheels /tmp/wheels

# torch's own wheels bring the CUDA libraries; the driver comes from the host (NVIDIA Container Toolkit).
FROM base AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN wheel=$(echo /tmp/wheels/*.whl) \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt "${wheel}[serve,trl,quantization]"
USER 1000
WORKDIR /workspace
ENTRYPOINT ["holdfast"]
CMD ["--help"]

FROM base AS cpu
RUN wheel=$(echo /tmp/wheels/*.whl) \
    && pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
        --constraint /tmp/constraints.txt "${wheel}[serve,trl]"
USER 1000
WORKDIR /workspace
ENTRYPOINT ["holdfast"]
CMD ["--help"]
