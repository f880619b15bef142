# docker build -t gdvae .                                      for CPUs
# docker build -t gdvae --build-arg TORCH_INDEX=cu126 .        for NVIDIA GPUs; run it with --gpus all
# docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/data" gdvae \
#     scripts/train_autoencoder.py --data_dir /data/images --logdir /data/run
# Without Docker, its commands were followed on 2026-11-29 in a Debian 12 with nothing but Python 3.11: they install, print
# the help, and train and sample on two ranks as a user without a name and home. `docker build` itself, and CUDA, were not
# tried.
FROM python:3.12-slim
ARG TORCH_INDEX=cpu
WORKDIR /app
# torch before the code, so that a changed file does not install it again
COPY constraints.txt .
RUN pip install --no-cache-dir --constraint constraints.txt --index-url https://download.pytorch.org/whl/${TORCH_INDEX} torch
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt --editable ".[mpi,volumes,medical,hdf5,report]"
# A user of --user has neither a name nor a home, and libraries cache under both.
ENV OMP_WAIT_POLICY=PASSIVE HOME=/tmp USER=gdvae
ENTRYPOINT ["python"]
CMD ["scripts/image_sample_vae.py", "--help"]
