"""Says where the packages lie, and compiles kernels at install where that is asked for.

Everything else about the project is in pyproject.toml.
"""

import importlib
import importlib.util
import os
import shutil
import sys

from setuptools import setup
from setuptools.command.build_py import build_py

VARIABLE = "MEDDANET_CUDA_ARCHS"


class BuildPy(build_py):
    """Copies the modules, then compiles the kernels for the architectures in the variable."""

    def run(self):
        """Leaves compiled kernels beside the modules that will be installed."""
        super().run()
        package = os.path.join(self.build_lib, "meddanet", "kernels")
        # an earlier build's, which a wheel would take along
        shutil.rmtree(os.path.join(package, "compiled"), ignore_errors=True)
        archs = os.environ.get(VARIABLE)
        if archs:
            compile_kernels(archs, "kernels" if self.editable_mode else package)


def compile_kernels(archs, folder):
    """Runs the package's own `aot.build` from where the modules lie, without installing it."""
    path = os.path.join(os.path.abspath(folder), "__init__.py")
    spec = importlib.util.spec_from_file_location("meddanet.kernels", path)
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[spec.name])
        aot = importlib.import_module("meddanet.kernels.aot")
        aot.build(aot.parse_archs(archs), aot.PACKAGED)
    except Exception as error:
        # an editable build only warns of these
        raise SystemExit(
            f"error: {VARIABLE}={archs}: {' '.join(str(error).split())}. The build must see the "
            "torch and triton that will run: pip install --no-build-isolation . or, after an "
            "installation without the variable, meddanet info --kernels --build 8.6,8.9"
        ) from error


setup(
    packages=[
        "meddanet", "meddanet.commands", "meddanet.data", "meddanet.engine", "meddanet.kernels",
        "meddanet.networks",
    ],
    # installed inside meddanet, because `kernels` alone is Hugging Face's package
    package_dir={"meddanet.kernels": "kernels"},
    package_data={"meddanet": ["py.typed", "pretrained/*.md", "pretrained/*.safetensors"]},
    # MANIFEST.in names what the sdist adds; none of that belongs in a wheel
    include_package_data=False,
    cmdclass={"build_py": BuildPy},
)
