import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Build the package with configs/ inside, where `--config NAME` looks for them; all else is in pyproject.toml."""

    def run(self):
        super().run()
        if not self.editable_mode:      # an editable install finds those of the checkout
            for path in Path("configs").rglob("*.yaml"):
                copy = Path(self.build_lib, "guided_diffusion_vae", path)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


setup(cmdclass={"build_py": BuildWithConfigs})
