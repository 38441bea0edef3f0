# Ebbflow on the CPU. Build:  docker build -t ebbflow .
# Run:    docker run -d --name ebb --memory 4g -v ebbflow:/data ebbflow
# Use:    docker exec -it ebb ebb add org/name && docker exec -it ebb ebb run name
FROM python:3.11-slim AS build
WORKDIR /source
COPY pyproject.toml constraints.txt README.md ./
COPY client client
COPY daemon daemon
COPY formats formats
COPY kernels kernels
# torch is pinned to an exact version in pyproject.toml; point pip at a CPU wheel with PIP_FIND_LINKS or PIP_INDEX_URL
# (docker build --build-arg PIP_INDEX_URL=...), or it may choose one of several gigabytes.
ARG PIP_INDEX_URL
ARG PIP_FIND_LINKS
RUN python -m venv /opt/ebbflow \
 && /opt/ebbflow/bin/pip install --no-cache-dir -c constraints.txt .

FROM python:3.11-slim
# torch's wheels need the OpenMP runtime; nothing else is missing from the slim image.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 ebbflow && install -d -o ebbflow -g ebbflow -m 0700 /data
COPY --from=build /opt/ebbflow /opt/ebbflow
ENV PATH=/opt/ebbflow/bin:$PATH EBBFLOW_HOME=/data
USER ebbflow
VOLUME /data
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s CMD ["ebb", "status"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["ebb"]
CMD ["serve"]
