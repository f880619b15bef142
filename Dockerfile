# docker build -t gdvae .                                      for CPUs
# docker build -t gdvae --build-arg TORCH_INDEX=cu126 .        for NVIDIA GPUs; run it with --gpus all
# docker run --rm -v "$PWD:/data" gdvae scripts/train_autoencoder.py --data_dir /data/images --logdir /data/run
FROM python:3.12-slim
ARG TORCH_INDEX=cpu
WORKDIR /app
# torch before the code, so that a changed file does not install it again
COPY constraints.txt .
RUN pip install --no-cache-dir --constraint constraints.txt --index-url https://download.pytorch.org/whl/${TORCH_INDEX} torch
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt --editable ".[mpi,volumes,medical,hdf5]"
ENV OMP_WAIT_POLICY=PASSIVE
ENTRYPOINT ["python"]
CMD ["scripts/image_sample_vae.py", "--help"]
