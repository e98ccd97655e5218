"""Without PyAV everything but video files works, and those say what to install."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

HIDDEN = """
    import sys
    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "av":
                raise ModuleNotFoundError("No module named 'av'", name="av")
    sys.meta_path.insert(0, Hidden())
"""

USE = """
    import torch
    import lvspec
    from lvspec.cli import main
    from lvspec.models.loading import load_processor
    from lvspec.shapes import pair
    from lvspec.video import read_video, write_video
    assert main(["info"]) == 0
    frames = torch.zeros(4, 84, 84, 3, dtype=torch.uint8)
    inputs = load_processor(pair.TARGET, "target")(frames, "describe the video.")
    assert inputs["video_grid_thw"].tolist() == [[2, 6, 6]]
    open("clip.mp4", "wb").close()
    for use in (lambda: read_video("clip.mp4"), lambda: write_video("new.mp4", frames)):
        try:
            use()
        except ImportError as error:
            print("said:", error)
    assert main(["generate", "--video", "clip.mp4", "--prompt", "describe"]) != 0
"""

COLLECT = """
    import pytest
    sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", sys.argv[1]]))
"""


def run(folder, script, *arguments):
    (folder / "script.py").write_text(textwrap.dedent(HIDDEN) + textwrap.dedent(script))
    command = [sys.executable, folder / "script.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_what_needs_no_file_works_and_what_does_says_what_to_install(tmp_path):
    done = run(tmp_path, USE)
    assert done.returncode == 0, done.stderr
    message = "av: expected PyAV, which reads and writes video files (pip install av), got "
    assert done.stdout.count(f"said: {message}ModuleNotFoundError: No module named 'av'") == 2
    assert done.stderr.count(message) == 1, done.stderr


@pytest.mark.slow
def test_every_test_can_be_collected(tmp_path):
    done = run(tmp_path, COLLECT, TESTS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "test_preprocess.py::test_patch_order_by_hand" in done.stdout
    assert "test_video.py::" not in done.stdout
