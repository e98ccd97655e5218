"""Video files to frames, and frames to the inputs of a model."""

from lvspec.video.files import Video, read_video
from lvspec.video.sampling import sample_indices
from lvspec.video.writing import write_video

__all__ = ["Video", "read_video", "sample_indices", "write_video"]
