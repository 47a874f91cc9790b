# One image for everything of ours in docker-compose.yml: Prefect's server, its services and worker,
# Dask, JupyterLab and TensorBoard. Build it for CPUs or for NVIDIA GPUs:
#
#   docker compose build                                   (RDD_TORCH in .env decides)
#   docker build --build-arg TORCH=cuda -t rdd-maps:cuda .
#
# The base is pinned by its tag; pin it by digest too where you mirror images:
#   --build-arg PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# cpu or cuda: which build of torch the image is to hold.
ARG TORCH=cpu
# Package index with that build of torch, from torch's installation page. Left empty, torch comes
# from the usual index, whose Linux wheels are CUDA builds: right for cuda, and several gigabytes too
# large for cpu, though they work.
ARG TORCH_INDEX_URL=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/rdd
ENV PATH=/opt/rdd/bin:$PATH
WORKDIR /build

# The dependencies change less often than the code: torch first, in a layer of its own.
COPY constraints.txt ./
RUN pip install -c constraints.txt ${TORCH_INDEX_URL:+--index-url "${TORCH_INDEX_URL}"} torch \
    && python -c "import sys, torch; cuda = torch.version.cuda; \
sys.exit('TORCH=cuda: expected a CUDA build of torch, got ' + torch.__version__ + '; set TORCH_INDEX_URL' \
if '${TORCH}' == 'cuda' and cuda is None else 0)"

COPY pyproject.toml README.md LICENSE ./
COPY storage ./storage
COPY pipeline ./pipeline
COPY flows ./flows
RUN pip install hatchling==1.27.0 \
    && pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && pip install -c constraints.txt \
        "$(echo /wheels/rdd_maps-*.whl)[server,notebooks,huggingface,s3,onnx]" \
    && pip uninstall --yes hatchling \
    && pip check

FROM ${PYTHON_IMAGE}
RUN useradd --uid 1000 --create-home rdd \
    && install --directory --owner rdd --group rdd /runs /app /app/notebooks
COPY --from=build /opt/rdd /opt/rdd
ENV PATH=/opt/rdd/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    DO_NOT_TRACK=1
WORKDIR /app
COPY prefect.yaml ./
COPY --chown=rdd:rdd notebooks ./notebooks
USER rdd
CMD ["rdd", "--help"]
