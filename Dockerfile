# lowrank_dist on CUDA, for one node or for a cluster that runs containers:
#   docker build -t lowrank-dist .
#   docker run --gpus all --ipc=host -v "$PWD:/workspace" lowrank-dist fit --config configs/llama3-70b_qpissa_32gpu.yaml
# CUDA is the development image: DeepSpeed compiles operators when they are first used.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git ninja-build python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 10001 lowrank
ENV PATH=/opt/lowrank/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/workspace/.cache/huggingface \
    TRITON_CACHE_DIR=/tmp/triton \
    TORCH_EXTENSIONS_DIR=/tmp/torch-extensions

# dependencies first: they change less often than the package
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src/lowrank_dist/_version.py src/lowrank_dist/_version.py
COPY configs configs
RUN python3 -m venv /opt/lowrank \
    && touch src/lowrank_dist/__init__.py \
    && pip install --no-cache-dir --constraint constraints.txt ".[datasets,evaluate,gpu,slurm]"
COPY src src
RUN pip install --no-cache-dir --no-deps --force-reinstall .

# by number, so that hosts which know no names can check it
USER 10001
WORKDIR /workspace
ENTRYPOINT ["lowrank-dist"]
CMD ["--help"]
