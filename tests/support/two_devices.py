"""An iteration of a target whose layers are on two CUDA devices, as accelerate dispatches them.

    python tests/support/two_devices.py GUARD TARGET DRAFT

Tensors are fakes, as in fake_cuda.py: where tensors of two devices meet, it fails.
"""

import ctypes
import sys

import fake_cuda
import torch
from accelerate.utils import send_to_device
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from lvspec.engine.graph import make_runner, models_obstacle
from lvspec.engine.roles import Roles
from lvspec.models.model import Model


def spread(model):
    """All but the first layer, the norm behind the last and the head go to the second device."""
    text = model.model.language_model
    for module in (*text.layers[1:], text.norm, model.lm_head):
        there(module, torch.device("cuda", 1))
    there(text.layers[0], torch.device("cuda", 0))
    return model


def there(module, device):
    """What accelerate does to a module that is dispatched: its forward takes inputs along."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            moved = torch.empty(weight.shape, dtype=weight.dtype, device=device)
            setattr(part, name, nn.Parameter(moved, requires_grad=False))
    forward = module.forward

    def moving(*args, **kwargs):
        return forward(*send_to_device(args, device), **send_to_device(kwargs, device))

    module.forward = moving


def main(target, draft):
    fake_cuda.trust_plans()
    torch.cuda.Event = lambda **kwargs: fake_cuda._Event()
    Roles._on_device = lambda self: fake_cuda.nullcontext()
    for kind in (nn.Linear, nn.Embedding, nn.Conv2d, nn.Conv3d, nn.LayerNorm):
        kind.reset_parameters = lambda self: None
    PreTrainedModel.init_weights = lambda self: None
    with FakeTensorMode(), torch.inference_mode():
        target, draft = spread(fake_cuda.build(target)), fake_cuda.build(draft)
        devices = {str(weight.device) for weight in target.parameters()}
        assert {device[-2:] for device in devices} == {":0", ":1"}, devices
        torch.tensor, tensor = fake_cuda.set_up_tensor, torch.tensor
        engine = fake_cuda.started(target, draft, "chain", 2)
        with engine.attention():
            engine.run_phases()
            torch.tensor = tensor
            done = engine.run_phases()
        assert done.report.device.type == "cuda" and done.report.device.index in (None, 0)
        model = Model(target, "target")
        runner = make_runner([model], capture=True, obstacle=None)
        runner.obstacle = models_obstacle([model])
        runner.is_due(0, 0)
        print(runner.description)


if __name__ == "__main__":
    if sys.argv[1]:
        ctypes.CDLL(sys.argv[1])
    main(*sys.argv[2:])
