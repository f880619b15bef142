"""Which module may import which; read from the source, so that lazy imports inside functions count too."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "guided_diffusion_vae"
# From the bottom up; a module imports only what stands before it, so there is no circle either.
LAYERS = """
    config data.resizing data.statistics files interfaces losses nn vae.tiling
    checkpoint_util data.augmentation data.config data.decoding data.listing data.manifest data.npz dist_util
    evaluation.image_metrics gaussian_diffusion resample runs.memory sampling.guidance sampling.sheets unet vae.blocks
    vae.discriminator vae.perceptual vae.posterior
    autoencoder data.batching data.image_folders data.microdoppler data.volume_folders evaluation.figures
    evaluation.set_metrics image_datasets logger respace runs.flags sampling.solvers vae
    vae.streaming
    data evaluation.features evaluation.likelihood fp16_util latent_datasets objectives runs.diffusers_export
    runs.factories sampling.sampler vae.foreign
    data.cache_writer evaluation.comparison evaluation.previews sampling.generate script_util train_util vae.objective
    vae_wrapper
    evaluation.roundtrip runs.planning runs.run runs.spaces sampling
    evaluation
    runs.configs runs.loading runs.training
    runs.export runs.tstr
""".split()
# A package counts as a module where its __init__.py imports something: it is then the public face of its room.
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
         for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__"}
MODULES = sorted(name for name, path in FILES.items() if path.read_text())
# library: (modules that may import it, whether only inside functions)
KEPT_IN = {
    "mpi4py": (["dist_util"], True),
    "argparse": (["runs.flags"], False),
    "yaml": (["runs.flags", "vae.foreign"], True),
    "matplotlib": (["evaluation.figures"], False),
    "tensorboard": (["logger"], True),
}
ONLY_INSIDE_FUNCTIONS = ["diffusers", "scipy", "safetensors", "tqdm", "nibabel", "lpips", "bitsandbytes"]


def tree_of(module):
    return ast.parse(FILES[module].read_text())


def imports_of(tree, inside_function=False):
    """Yield (name of what is imported, whether inside a function); modules of this package begin with a dot."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            yield start, inside_function
            # What is imported may be a module itself: `from ..data import npz`, `from torch.utils import tensorboard`.
            joint = "" if start.endswith(".") else "."
            yield from ((f"{start}{joint}{alias.name}", inside_function) for alias in node.names)
        else:
            yield from imports_of(node, inside_function or isinstance(node, (ast.FunctionDef, ast.Lambda)))


def imported(module):
    """Return the modules of this package that a module imports."""
    names = set()
    for name, _ in imports_of(tree_of(module)):
        dots = len(name) - len(name.lstrip("."))
        parts = (module + ".__init__" * (FILES[module].stem == "__init__")).split(".")
        base = parts[:-dots] if dots else []
        full = ".".join([*base, name.lstrip(".")]).removeprefix("guided_diffusion_vae.")
        if dots or name.startswith("guided_diffusion_vae"):
            names.add(full)
    return names & set(MODULES)


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
    found = set(imports_of(ast.parse(source)))
    assert found >= {("os.path", False), ("mpi4py.MPI", False), (".nn", False), (".unet", False),
                     ("guided_diffusion_vae.losses", False), ("torch.utils.tensorboard", True), ("yaml", False)}


def test_every_module_has_its_place():
    assert MODULES == sorted(LAYERS), "put a new module into LAYERS, above all that it imports"


@pytest.mark.parametrize("module", LAYERS)
def test_imports_run_downwards_only(module):
    below = LAYERS[:LAYERS.index(module)]
    assert imported(module) <= set(below)


@pytest.mark.parametrize("module", LAYERS)
def test_a_library_is_known_to_its_own_modules_alone(module):
    for name, inside_function in imports_of(tree_of(module)):
        parts = set(name.split("."))
        for library, (modules, lazy_import) in KEPT_IN.items():
            if library in parts:
                assert module in modules and (inside_function or not lazy_import), f"{module} imports {library}"
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
