# The first command of the README, on a CPU:
#   docker build -t sslx . && docker run -v "$PWD/runs:/runs" sslx
# On NVIDIA GPUs: docker build --build-arg EXTRA=[cuda] -t sslx . && docker run --gpus all ... sslx
FROM python:3.12-slim
ARG EXTRA=
WORKDIR /sslx
COPY pyproject.toml README.md LICENSE ./
COPY sslx sslx
COPY configs configs
RUN pip install --no-cache-dir ".$EXTRA"
WORKDIR /
ENTRYPOINT ["sslx"]
CMD ["train", "mae_digits", "--workdir", "/runs/digits"]
