"""Gradients of a net in its forms for training, under autocast and without."""
import copy
from contextlib import nullcontext

import torch

from timm_dense2net import training_form


def gradients_of_forms(net, x, dtype):
    """Of all parameters, of the plain form in float32, the plain form and the training form under autocast."""
    targets = torch.arange(len(x), device=x.device) % 5
    gradients = []
    for plain, autocasts in ((True, False), (True, True), (False, True)):
        copied = copy.deepcopy(net)
        form = training_form.plain_form() if plain else nullcontext()
        with form, torch.autocast(x.device.type, dtype, autocasts):
            assert training_form.block_has_training_form(
                copied.features.denseblock1, copied.features.conv0(x)) is not plain
            logits = copied(x)
        torch.nn.functional.cross_entropy(logits.float(), targets).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in copied.parameters()]))
    return gradients
