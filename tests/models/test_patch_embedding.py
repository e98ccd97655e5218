"""Patches of a video as rows of a product."""

import pytest
import torch
from passes import Names
from torch import nn

from lvspec.models.patch_embedding import patches_multiplied

KERNEL = (2, 5, 5)


def convolution(**options):
    return nn.Conv3d(3, 16, KERNEL, stride=KERNEL, **options)


def convolved(module, patches):
    with torch.no_grad(), Names() as names:
        return module(patches), "convolution" in names.seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_patches_are_multiplied(bias, dtype):
    model = nn.Sequential(nn.Identity(), convolution(bias=bias)).to(dtype)
    patches = torch.randn(7, 3, *KERNEL, dtype=dtype)
    theirs, was_convolved = convolved(model, patches)
    with patches_multiplied(model):
        ours, is_convolved = convolved(model, patches)
    torch.testing.assert_close(ours, theirs)
    assert was_convolved and not is_convolved
    assert convolved(model, patches)[1], "nothing is left behind"


def test_what_is_no_product_is_convolved():
    """Several places, a sequence without a batch, groups, padding, other types and classes."""

    class Own(nn.Conv3d):
        pass

    cases = [
        (convolution(), torch.randn(2, 3, 4, 5, 5)),
        (convolution(), torch.randn(3, *KERNEL)),
        (nn.Conv3d(4, 8, KERNEL, groups=2), torch.randn(2, 4, *KERNEL)),
        (convolution(padding=1), torch.randn(2, 3, *KERNEL)),
        (nn.Conv3d(3, 8, 2, dilation=2), torch.randn(2, 3, 3, 3, 3)),
        (convolution().bfloat16(), torch.randn(2, 3, *KERNEL).bfloat16()),
        (Own(3, 16, KERNEL), torch.randn(2, 3, *KERNEL)),
    ]
    for module, patches in cases:
        theirs, _ = convolved(module, patches)
        with patches_multiplied(module):
            ours, is_convolved = convolved(module, patches)
        assert is_convolved and torch.equal(ours, theirs), module


def test_a_forward_of_somebody_elses_stays():
    module = convolution()
    module.forward = lambda patches: patches + 1
    with patches_multiplied(module):
        assert torch.equal(module(torch.ones(2)), torch.full((2,), 2.0))
    assert "forward" in vars(module)


def test_nothing_is_left_behind_by_an_error():
    module = convolution()
    with pytest.raises(KeyError), patches_multiplied(module):
        raise KeyError
    assert "forward" not in vars(module)
