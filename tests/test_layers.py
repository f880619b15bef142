"""Which module may import which; read from the source, so that lazy imports inside functions count too."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "guided_diffusion_vae"
# From the bottom up; a module imports only what stands before it, so there is no circle either.
LAYERS = """
    config files
    nn losses
    unet autoencoder discriminator
    gaussian_diffusion respace resample solvers guidance export
    checkpoint_util perceptual
    streaming vae_wrapper
    image_datasets volume_datasets latent_datasets microdoppler
    dist_util logger
    fp16_util
    objectives train_util
    metrics figures sampling
    previews evaluation
    script_util
    memory spaces loading training
""".split()
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
# library: (modules that may import it, whether only inside functions)
KEPT_IN = {
    "mpi4py": (["dist_util"], True),
    "argparse": (["script_util"], False),
    "yaml": (["script_util", "vae_wrapper"], True),
    "matplotlib": (["figures"], False),
    "tensorboard": (["logger"], True),
}
ONLY_INSIDE_FUNCTIONS = ["diffusers", "scipy", "safetensors", "tqdm", "nibabel", "lpips", "bitsandbytes"]


def tree_of(module):
    return ast.parse((PACKAGE / f"{module}.py").read_text())


def imports_of(tree, inside_function=False):
    """Yield (name of what is imported, whether inside a function); modules of this package begin with a dot."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            if start in (".", "guided_diffusion_vae"):
                yield from ((f".{alias.name}", inside_function) for alias in node.names)
            else:
                yield start, inside_function
                if start == "torch.utils":
                    yield from ((alias.name, inside_function) for alias in node.names)
        else:
            yield from imports_of(node, inside_function or isinstance(node, (ast.FunctionDef, ast.Lambda)))


def test_imports_are_found_wherever_they_stand():
    source = """
import os.path, mpi4py.MPI
from . import nn
from .unet import UNetModel
from guided_diffusion_vae import losses
def f():
    if True:
        from torch.utils import tensorboard
class C:
    import yaml
"""
    assert list(imports_of(ast.parse(source))) == [
        ("os.path", False), ("mpi4py.MPI", False), (".nn", False), (".unet", False), (".losses", False),
        ("torch.utils", True), ("tensorboard", True), ("yaml", False),
    ]


def test_every_module_has_its_place():
    assert MODULES == sorted(LAYERS), "put a new module into LAYERS, above all that it imports"


@pytest.mark.parametrize("module", LAYERS)
def test_imports_run_downwards_only(module):
    below = LAYERS[:LAYERS.index(module)]
    ours = [name.removeprefix("guided_diffusion_vae").lstrip(".") for name, _ in imports_of(tree_of(module))
            if name.startswith((".", "guided_diffusion_vae"))]
    assert set(ours) <= set(below)


@pytest.mark.parametrize("module", LAYERS)
def test_a_library_is_known_to_its_own_modules_alone(module):
    for name, inside_function in imports_of(tree_of(module)):
        parts = set(name.split("."))
        for library, (modules, lazily) in KEPT_IN.items():
            if library in parts:
                assert module in modules and (inside_function or not lazily), f"{module} imports {library}"
        if parts & set(ONLY_INSIDE_FUNCTIONS):
            assert inside_function, f"{module} imports {name} for everybody"


@pytest.mark.parametrize("module", LAYERS)
def test_nothing_is_loaded_loosely_or_unpickled(module):
    refused = {"strict": False, "weights_only": False, "allow_pickle": True}
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.keyword) and node.arg in refused and isinstance(node.value, ast.Constant):
            assert node.value.value is not refused[node.arg], f"{module}, line {node.value.lineno}"
    loaded = {name for name, _ in imports_of(tree_of(module))}
    assert not loaded & {"pickle", "cPickle", "dill", "joblib"}
