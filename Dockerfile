# One image, two Python environments: training on the base's own torch, and SGLang as published, with its own.
# docs/docker.md has the commands, for GPUs and for CPUs.
ARG BASE=nvcr.io/nvidia/pytorch:26.04-py3
FROM ${BASE}

# Versions and hashes of everything but torch, for the base's Python.
ARG LOCK=docker/trainer.lock
# A requirement, where the base has no torch: torch==2.13.0 for the CPU.
ARG TORCH=""
# Empty: without SGLang.
ARG SGLANG_LOCK=docker/sglang.lock

# NVIDIA's image has a constraint file that lets pip install no other versions than its own.
ENV PIP_CONSTRAINT="" PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -c "import ensurepip" 2>/dev/null || { apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends python3-venv ca-certificates && rm -rf /var/lib/apt/lists/*; }
COPY docker/*.lock /opt/fapo/docker/

# The three steps may read an index's address and credentials from a secret, which stays in no layer:
#   docker build --secret id=pip,src=$HOME/.config/pip/pip.conf .
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv --system-site-packages /opt/fapo/trainer \
    && if [ -n "${TORCH}" ]; then /opt/fapo/trainer/bin/pip install --no-compile "${TORCH}"; fi \
    && /opt/fapo/trainer/bin/pip install --no-compile --no-deps --require-hashes -r "/opt/fapo/${LOCK}"

# A command rather than a link: Python finds a virtual environment by the path that it is started with.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=cache,target=/root/.cache/pip \
    if [ -n "${SGLANG_LOCK}" ]; then \
    python3 -m venv /opt/fapo/sglang \
    && /opt/fapo/sglang/bin/pip install --no-compile --no-deps --require-hashes -r "/opt/fapo/${SGLANG_LOCK}" \
    && printf '#!/bin/sh\nexec /opt/fapo/sglang/bin/python "$@"\n' > /usr/local/bin/sglang-python \
    && chmod 755 /usr/local/bin/sglang-python; fi

# setuptools, which builds the package, is in the lock.
COPY pyproject.toml setup.py README.md LICENSE /opt/fapo/source/
COPY megatron_fapo /opt/fapo/source/megatron_fapo
RUN /opt/fapo/trainer/bin/pip install --no-compile --no-deps --no-build-isolation --no-index /opt/fapo/source

# Any user may run it: the home is writable for all, so that --user and Slurm's containers find a place for caches.
RUN useradd --uid 10001 --create-home --home-dir /opt/fapo/home fapo && chmod 1777 /opt/fapo/home \
    && mkdir /fapo && chown fapo /fapo && chmod 1777 /fapo
COPY configs /fapo/configs
COPY examples /fapo/examples
COPY tools /fapo/tools
ENV PATH=/opt/fapo/trainer/bin:${PATH} HOME=/opt/fapo/home
USER fapo
WORKDIR /fapo
CMD ["fapo", "--help"]
