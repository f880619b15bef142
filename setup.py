from setuptools import setup

setup(
    name="guided-diffusion-vae",
    version="0.1.0",
    description="guided-diffusion in the latent space of a strided KL autoencoder",
    packages=["guided_diffusion_vae"],
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.10",  # torch.load(weights_only=True) had holes before
        "numpy",
        "blobfile>=1.0.5",
        "mpi4py>=4.0",
        "pillow>=10.1",  # ImageFont.load_default(size)
        "diffusers>=0.32",  # the first with AutoencoderDC
        "safetensors",
        "pyyaml",
        "tqdm",
        "tensorboard",
        "matplotlib",
        "scipy",
    ],
    extras_require={
        "mpi": ["mpich"],  # brings mpiexec; leave it out where the machine has an MPI of its own
        "volumes": ["nibabel"],
        "eval": ["torch-fidelity"],
        "perceptual": ["lpips"],
        "gpu": ["bitsandbytes"],
        "test": ["pytest", "hypothesis", "nibabel"],
    },
)
