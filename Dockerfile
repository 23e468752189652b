# Two images from one file, both running as an ordinary user:
#
#   docker build -t foresight .                          CUDA (the default target, the last one)
#   docker build -t foresight:cpu --target cpu .         CPU
#
# The bundled model is inside; `docker run -p 127.0.0.1:8000:8000 foresight:cpu` answers at once.

ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS base
# g++: the CPU's native kernels are compiled in the background, Triton builds its launchers with it.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
# The cache of models from the hub belongs to the user also when a fresh volume is mounted there.
RUN useradd --uid 10001 --create-home foresight \
 && install -d -o foresight -g foresight /home/foresight/.cache /home/foresight/.cache/huggingface
WORKDIR /app
ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore

# The dependencies come before the sources, so that a change of code keeps their layers. What
# `COPY . .` brings is the allow-list in .dockerignore.
FROM base AS cpu
COPY pyproject.toml ./
COPY deploy/requirements.py deploy/
RUN pip install "$(python deploy/requirements.py torch)" --index-url https://download.pytorch.org/whl/cpu
RUN python deploy/requirements.py > requirements.txt && pip install -r requirements.txt
COPY . .
RUN pip install --no-deps .
USER foresight
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["foresight"]
CMD ["serve", "--config", "configs/demo.yaml", "--host", "0.0.0.0", "--port", "8000"]

FROM base AS cuda
# PyPI's torch for Linux brings the CUDA libraries; the host only needs the driver and its container toolkit.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY pyproject.toml ./
COPY deploy/requirements.py deploy/
RUN python deploy/requirements.py --extra gpu > requirements.txt && pip install -r requirements.txt
COPY . .
RUN pip install --no-deps .
USER foresight
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["foresight"]
CMD ["serve", "--config", "configs/demo.yaml", "--host", "0.0.0.0", "--port", "8000"]
