# Debian 12, as that is what the tests run on.
FROM debian:12-slim AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        ca-certificates gcc libc6-dev libfuse3-dev pkg-config python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/natsfs
WORKDIR /src
COPY pyproject.toml README.md LICENSE* ./
COPY natsfs natsfs
RUN /opt/natsfs/bin/pip install --no-cache-dir .

# Without the compiler.
FROM debian:12-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates fuse3 python3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/natsfs /opt/natsfs
ENV PATH=/opt/natsfs/bin:$PATH LC_ALL=C.UTF-8
ENTRYPOINT ["natsfs"]
CMD ["--help"]
