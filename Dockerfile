# syntax=docker/dockerfile:1
# OServe with vLLM for CPU. Build it in the repository, run it with a model:
#
#   docker build -t oserve .
#   docker run --init --shm-size=2g --stop-timeout 60 -p 127.0.0.1:8000:8000 -v /path/to/model:/model:ro oserve
#
# --init: something has to reap what engines leave behind. --shm-size: vLLM's processes talk through /dev/shm,
# of which Docker gives 64 MB. --stop-timeout: running requests get gateway.shutdown_grace_s, 30 s.
# Settings are environment variables (-e OSERVE_CLUSTER_CPU_SLOTS=4) or a file (-v ... -e OSERVE_CONFIG=...).

FROM python:3.11-slim-bookworm AS build
WORKDIR /source
RUN python -m venv /opt/oserve
ENV PATH=/opt/oserve/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# Pins first: they change less often than sources, and take minutes.
COPY requirements requirements
COPY tools/setup.py tools/
# PyTorch's own index has the CPU builds; set-up knows where it is.
RUN pip install --no-deps --extra-index-url "$(PYTHONPATH=tools python -c 'import setup; print(setup.TORCH_INDEX)')" \
      -r requirements/core.txt -r requirements/engine-cpu.txt setuptools==78.1.1
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-deps --no-build-isolation .

FROM python:3.11-slim-bookworm
# vLLM's CPU kernels are linked against libnuma.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --create-home --home-dir /var/lib/oserve --shell /usr/sbin/nologin oserve
COPY --from=build /opt/oserve /opt/oserve
# The gateway listens on every address of the container; which of the host's it is on, -p says.
ENV PATH=/opt/oserve/bin:$PATH \
    OSERVE_GATEWAY_HOST=0.0.0.0 \
    OSERVE_STATE_DIR=/var/lib/oserve/state
USER 10001
WORKDIR /var/lib/oserve
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["oserve"]
CMD ["serve", "/model"]
