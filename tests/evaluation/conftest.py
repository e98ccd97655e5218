"""A random pair with its processors, and four tiny videos of noise."""

import pytest
from noise import write_noise

from lvspec.config import DecodeConfig
from lvspec.evaluation.samples import Sample
from lvspec.models.loading import load_pair


@pytest.fixture(scope="package")
def loaded_pair(random_pair_folders):
    """The random checkpoints as `load_pair` returns them."""
    return load_pair(*random_pair_folders, device="cpu")


@pytest.fixture(scope="package")
def videos(tmp_path_factory):
    """A folder with 0.mp4 to 3.mp4."""
    return write_noise(tmp_path_factory.mktemp("videos"), 4)


@pytest.fixture
def samples(videos):
    """One question about each video."""
    return [
        Sample(f"{index}.mp4", str(videos / f"{index}.mp4"), "describe the video .")
        for index in range(4)
    ]


@pytest.fixture
def short():
    """Captions of eight tokens, by chains of three."""
    return DecodeConfig(gamma=3, max_new_tokens=8)
