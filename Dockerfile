# The server's image: `docker build -t ghcr.io/optwatch/optwatch-server:0.1.0 .`
# No torch is in it: the server never computes with tensors, and torch alone would be several gigabytes.

FROM python:3.12-slim AS build
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY agent agent
COPY server server
COPY alerts alerts
COPY runbooks runbooks
COPY dashboards/generated dashboards/generated
# The constraints hold for what builds the wheel too.
ENV PIP_CONSTRAINT=/source/constraints.txt PIP_BUILD_CONSTRAINT=/source/constraints.txt \
    PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN pip wheel --no-deps --wheel-dir /wheel .
RUN python -m venv /opt/optwatch \
    && /opt/optwatch/bin/pip install "optwatch[server,postgresql] @ file://$(ls /wheel/optwatch-*.whl)" \
    && /opt/optwatch/bin/pip uninstall --yes pip
RUN mkdir -p /var/lib/optwatch

FROM python:3.12-slim
LABEL org.opencontainers.image.title="optwatch server" \
      org.opencontainers.image.description="Runs, heartbeats and events of PyTorch training" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/optwatch /opt/optwatch
# For `docker run` with a named volume; the chart mounts its own here.
COPY --from=build --chown=65532:65532 /var/lib/optwatch /var/lib/optwatch
ENV PATH=/opt/optwatch/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    OPTWATCH_DATABASE_URL=sqlite:////var/lib/optwatch/optwatch.sqlite3
# A number, so that Kubernetes can see for itself that it is not root.
USER 65532:65532
EXPOSE 8000
ENTRYPOINT ["/opt/optwatch/bin/optwatch"]
CMD ["server", "--host", "0.0.0.0"]
