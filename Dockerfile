# syntax=docker/dockerfile:1
# docker build -t scatterbrain .
# docker run --rm --gpus all --shm-size=8g -v /path/to/imagenet:/data:ro -v "$PWD/checkpoints:/app/checkpoints" -v "$PWD/logs:/app/logs" \
#     scatterbrain experiment=imagenet-t2tvit-eval model/t2tattn_cfg=sblocal datamodule.data_dir=/data eval.ckpt=...
FROM nvidia/cuda:12.8.1-runtime-ubuntu24.04

# gcc and the Python headers are for Triton, which compiles its launchers at run time
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1

WORKDIR /app
# dependencies first: their layer stays cached while only the code changes
COPY requirements.txt constraints.txt ./
RUN python3 -m venv "$VIRTUAL_ENV" \
    && pip install --no-cache-dir -r requirements.txt -c constraints.txt

COPY . .

# not root: a run writes its files into mounted folders as this user
RUN useradd --create-home --uid 10001 scatterbrain \
    && mkdir -p logs \
    && chown -R 10001 logs checkpoints
USER 10001

ENTRYPOINT ["python", "run.py"]
CMD ["--help"]
