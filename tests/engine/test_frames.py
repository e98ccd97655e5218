"""Where a target looks while it says a caption: HF's own attention weights, frame by frame."""

import pytest
import torch

from lvspec.engine.frames import FrameAttention, frame_attention

TOKENS = list(range(20, 57))  # more than two passes of rows


@pytest.mark.parametrize("parts", [(3, ("video", 4, 6, 6), 5), (2, ("video", 3, 4, 4))])
def test_mass_by_frame_is_that_of_hf(parts, pair, make_prompt, hf_passes):
    inputs, (target, _) = make_prompt(*parts, dtype=torch.float64), pair
    groups = parts[1][1]
    found = frame_attention(target, inputs, TOKENS, frames=2 * groups)

    prompt, rest = hf_passes(target, inputs, TOKENS)
    length = inputs["input_ids"].shape[1]
    video = (inputs["input_ids"][0] == 6).nonzero().flatten()
    rows = torch.cat(
        [
            torch.stack(prompt.attentions)[:, 0, :, -1:, video],
            torch.stack(rest.attentions)[:, 0, :, :-1, :length][..., video],
        ],
        dim=2,
    )
    wanted = rows.mean(dim=(0, 1)).unflatten(1, (groups, -1)).sum(-1)
    # HF's eager attention takes its softmax in float32, whatever the model computes in.
    torch.testing.assert_close(found.mass, wanted, rtol=2e-6, atol=0)
    assert found.mass.std(dim=1).min() > 0  # frames are told apart


def test_the_models_decode_as_before(pair, make_prompt, hf_greedy):
    inputs, (target, _) = make_prompt(3, ("video", 2, 4, 4), 2, dtype=torch.float64), pair
    before = hf_greedy(target, inputs, 5)
    frame_attention(target, inputs, before, frames=4)
    assert hf_greedy(target, inputs, 5) == before


def test_values_for_json():
    nan = torch.nan
    found = FrameAttention(torch.tensor([[nan, nan], [0.123456, 0.5]]), frames=3)
    assert found.to_dict([0.0, 0.25, 0.5]) == {
        "timestamps": [0.0, 0.5],
        "mass": [[None, None], [0.1235, 0.5]],
    }
    with pytest.raises(ValueError, match="timestamps: expected one for each of 3 frames, got 1"):
        found.to_dict([0.0])


@pytest.mark.parametrize(
    "parts, frames, message",
    [
        ((9,), 4, "expected a prompt with a video"),
        ((2, ("video", 2, 4, 4), 2, ("video", 2, 4, 4)), 8, "expected one video"),
        ((2, ("video", 2, 4, 4), ("image", 4, 4)), 4, "expected one video"),
        ((2, ("video", 4, 4, 4)), 3, "4 groups of 3 frames"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(parts, frames, message, pair, make_prompt):
    with pytest.raises(ValueError, match=message):
        frame_attention(pair[0], make_prompt(*parts, dtype=torch.float64), [20], frames=frames)
