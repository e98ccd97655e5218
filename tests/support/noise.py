"""Videos of noise, for who only needs some."""

import torch

from lvspec.video import write_video


def write_noise(folder, count):
    """`0.mp4`, `1.mp4`, ... of two seconds and 84 x 84 pixels, the same every time."""
    for index in range(count):
        rng = torch.Generator().manual_seed(index)
        frames = torch.randint(0, 256, (8, 84, 84, 3), generator=rng, dtype=torch.uint8)
        write_video(folder / f"{index}.mp4", frames, fps=4)
    return folder
