"""Allowed imports between modules, read from the source: imports inside functions count, too."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "guided_diffusion_vae"
# From the bottom up: a module imports only modules listed before it, so there are no circles.
LAYERS = """
    config programs data.archives data.resizing data.statistics launchers locks runs.deprecated files
    interfaces losses nn state_dicts vae.tiling
    checkpoint_util data.arrays data.attributes data.augmentation data.config data.colormaps data.decoding data.labels
    data.listing data.manifest
    data.axes data.conditions data.medical data.npz dist_util ema_profiles
    evaluation.image_metrics gaussian_diffusion resample runs.memory sampling.guidance sampling.sheets unet vae.blocks
    vae.discriminator vae.perceptual vae.posterior
    autoencoder vae.compvis data.batching data.image_folders data.spectrograms data.volume_folders
    data.microdoppler evaluation.figures evaluation.physics evaluation.set_metrics image_datasets logger
    rectified_flow respace runs.flags sampling.solvers vae vae.streaming
    data evaluation.features evaluation.likelihood fp16_util latent_datasets objectives runs.diffusers_export
    runs.factories sampling.sampler vae.foreign
    data.cache_writer evaluation.anomaly evaluation.comparison evaluation.previews evaluation.study
    sampling.editing sampling.generate
    evaluation.report_page
    script_util train_util vae.objective vae_wrapper
    distillation evaluation.roundtrip runs.planning runs.run runs.spaces sampling
    evaluation
    runs.cards
    runs.configs runs.loading runs.training
    runs.ema_sweep runs.doctor runs.export runs.study_models runs.study runs.teacher runs.tstr
""".split()
# A package counts as a module if its __init__.py imports something: it is then the public interface of its folder.
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
         for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__"}
MODULES = sorted(name for name, path in FILES.items() if path.read_text())
# Commands are the top layer: they import from all rooms, and not each other.
COMMANDS = [name for name in MODULES if name.split(".")[0] in ("commands", "__main__")]
TOP = [*COMMANDS, "api"]
# {library: (modules that may import it, whether only inside functions)}
RESTRICTED = {
    "mpi4py": (["dist_util"], True),
    "argparse": (["runs.flags"], False),
    "yaml": (["files"], True),
    "matplotlib": (["evaluation.figures", "data.colormaps"], False),
    "tensorboard": (["logger"], True),
    "wandb": (["logger"], True),
    "huggingface_hub": (["runs.cards"], True),
}
ONLY_INSIDE_FUNCTIONS = ["diffusers", "scipy", "safetensors", "tqdm", "nibabel", "h5py", "SimpleITK", "lpips",
                         "bitsandbytes", "jinja2", "plotly"]


def parse_module(module):
    return ast.parse(FILES[module].read_text())


def iter_imports(tree, inside_function=False):
    """Yield (imported name, whether inside a function); names of this package start with a dot."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            yield start, inside_function
            # The imported name may be a module: `from ..data import npz`, `from torch.utils import tensorboard`.
            joint = "" if start.endswith(".") else "."
            yield from ((f"{start}{joint}{alias.name}", inside_function) for alias in node.names)
        else:
            yield from iter_imports(node, inside_function or isinstance(node, (ast.FunctionDef, ast.Lambda)))


def imported_modules(module):
    """Return the modules of this package that a module imports."""
    names = set()
    for name, _ in iter_imports(parse_module(module)):
        dots = len(name) - len(name.lstrip("."))
        parts = (module + ".__init__" * (FILES[module].stem == "__init__")).split(".")
        base = parts[:-dots] if dots else []
        full = ".".join([*base, name.lstrip(".")]).removeprefix("guided_diffusion_vae.")
        if dots or name.startswith("guided_diffusion_vae"):
            names.add(full)
    return names & set(MODULES)


def test_iter_imports_finds_imports_at_any_depth():
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
    imports = set(iter_imports(ast.parse(source)))
    assert imports >= {("os.path", False), ("mpi4py.MPI", False), (".nn", False), (".unet", False),
                       ("guided_diffusion_vae.losses", False), ("torch.utils.tensorboard", True), ("yaml", False)}


def test_layers_list_every_module():
    assert MODULES == sorted(LAYERS + TOP), "insert a new module into LAYERS after the modules that it imports"


@pytest.mark.parametrize("module", LAYERS + TOP)
def test_module_imports_only_lower_layers(module):
    below = {"api": LAYERS + COMMANDS}.get(module, LAYERS if module in TOP else LAYERS[:LAYERS.index(module)])
    assert imported_modules(module) <= set(below)


def test_import_chains_are_at_most_eight_modules_long():
    depth = {}
    for module in LAYERS:   # in this order all that a module imports has its depth already
        depth[module] = 1 + max((depth[other] for other in imported_modules(module)), default=0)
    assert {module: chain for module, chain in depth.items() if chain > 8} == {}


@pytest.mark.parametrize("module", LAYERS + TOP)
def test_restricted_libraries_are_imported_only_by_their_modules(module):
    for name, inside_function in iter_imports(parse_module(module)):
        parts = set(name.split("."))
        for library, (modules, lazy_import) in RESTRICTED.items():
            if library in parts:
                assert module in modules and (inside_function or not lazy_import), f"{module} imports {library}"
        if parts & set(ONLY_INSIDE_FUNCTIONS):
            assert inside_function, f"{module} imports {name} at the top"


@pytest.mark.parametrize("module", LAYERS + TOP)
def test_loading_is_strict_and_without_pickle(module):
    forbidden = {"strict": False, "weights_only": False, "allow_pickle": True}
    for node in ast.walk(parse_module(module)):
        if isinstance(node, ast.keyword) and node.arg in forbidden and isinstance(node.value, ast.Constant):
            assert node.value.value is not forbidden[node.arg], f"{module}, line {node.value.lineno}"
    imports = {name for name, _ in iter_imports(parse_module(module))}
    assert not imports & {"pickle", "cPickle", "dill", "joblib"}
