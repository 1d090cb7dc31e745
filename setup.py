"""Says where the packages lie; everything else about the project is in pyproject.toml."""

from setuptools import setup

setup(
    packages=[
        "meddanet", "meddanet.data", "meddanet.engine", "meddanet.kernels", "meddanet.networks",
    ],
    # installed inside meddanet, because `kernels` alone is Hugging Face's package
    package_dir={"meddanet.kernels": "kernels"},
    package_data={"meddanet": ["py.typed", "pretrained/*.md", "pretrained/*.safetensors"]},
    # MANIFEST.in names what the sdist adds; none of that belongs in a wheel
    include_package_data=False,
)
