"""Packaging: the version, the requirements and the map of the folders stand here only."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).with_name("README.md")

# The triton wheels exist for these machines only; lvspec.ops says so where triton is absent.
TRITON_MACHINES = (
    'platform_system == "Linux" and (platform_machine == "x86_64" or platform_machine == "aarch64")'
)

setup(
    name="lvspec",
    version="0.1.0",
    description="Loosely speculative decoding of Video-LLMs: faster captions without training",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # kernels/ is a room of its own in the tree and lvspec.kernels once imported: a top-level module
    # named `kernels` would shadow the HuggingFace package that transformers looks for.
    packages=[*find_packages(include=["lvspec", "lvspec.*"]), "lvspec.kernels"],
    package_dir={"lvspec.kernels": "kernels"},
    package_data={"lvspec.shapes": ["**/*.safetensors", "**/*.json", "**/*.md"]},
    install_requires=[
        # 2.10 is the first torch whose CUDA build goes with triton 3.6.
        "torch>=2.10,<3",
        f"triton>=3.6; {TRITON_MACHINES}",
        "transformers>=5.17,<6",
        "tokenizers",
        "safetensors",
        "numpy",
        "av>=14.1",
        "pillow",
        "rich",
        "tqdm",
    ],
    extras_require={
        "test": ["pytest>=8", "pytest-benchmark>=5", "pytest-timeout>=2.3", "ruff>=0.9"],
        "flash-attn": ["flash-attn"],
    },
    entry_points={"console_scripts": ["lvspec = lvspec.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
