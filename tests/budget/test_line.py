"""Moving along a step that has been taken: against copies of the parameters, for every supported optimizer."""

import copy

import pytest
import torch

from open_r1_capo.budget.line import CopiedLine, Line, line_of

OPTIMIZERS = {
    "adam": (torch.optim.Adam, {}),
    "adam-l2": (torch.optim.Adam, {"weight_decay": 0.3}),
    "adam-amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "adam-maximize": (torch.optim.Adam, {"maximize": True}),
    "adam-decoupled": (torch.optim.Adam, {"decoupled_weight_decay": True, "weight_decay": 0.3}),
    "adam-fused": (torch.optim.Adam, {"fused": True}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.3}),
    "adamw-single": (torch.optim.AdamW, {"weight_decay": 0.3, "foreach": False, "eps": 1e-3}),
    "adamw-foreach": (torch.optim.AdamW, {"weight_decay": 0.3, "foreach": True, "betas": (0.5, 0.7)}),
    "sgd": (torch.optim.SGD, {}),
    "sgd-decay": (torch.optim.SGD, {"weight_decay": 0.3}),
    "sgd-maximize": (torch.optim.SGD, {"maximize": True, "weight_decay": 0.3}),
    "sgd-momentum": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.3}),
    "sgd-nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.3}),
    "unknown": (torch.optim.RMSprop, {}),
}


def model_and_optimizer(name, dtype=torch.float64):
    """Two groups of different rates, one parameter without a gradient."""
    kind, options = OPTIMIZERS[name]
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(5, 3, dtype=dtype)) for _ in range(3)]
    groups = [{"params": parameters[:1], "lr": 0.03}, {"params": parameters[1:], "lr": 0.2}]
    return parameters, kind(groups, lr=0.1, **options)


def take(parameters, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters[:2]:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_point_of_the_line(name):
    parameters, optimizer = model_and_optimizer(name)
    line = line_of(optimizer)
    assert isinstance(line, CopiedLine if name == "unknown" else Line)
    for seed in range(3):  # the third step has moments of earlier ones
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters[:2]:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        old = [p.detach().clone() for p in parameters]
        line.begin()
        optimizer.step()
        new = [p.detach().clone() for p in parameters]
        for s in (0.3, 0.01, 7.0, 1.0, 0.0):
            line.move(s)
            for parameter, a, b in zip(parameters, old, new, strict=True):
                assert torch.allclose(parameter, a + s * (b - a), rtol=1e-9, atol=1e-12)
    assert torch.equal(parameters[2], old[2])  # it had no gradient


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd-nesterov", "sgd-decay"])
@pytest.mark.parametrize(("dtype", "resolution"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_within_the_rounding_of_the_dtype(name, dtype, resolution):
    parameters, optimizer = model_and_optimizer(name, dtype)
    line = line_of(optimizer)
    take(parameters, optimizer, 0)
    for parameter in parameters[:2]:
        parameter.grad = torch.ones_like(parameter)
    old = [p.detach().double() for p in parameters]
    line.begin()
    optimizer.step()
    new = [p.detach().double() for p in parameters]
    line.move(0.25)
    for parameter, a, b in zip(parameters, old, new, strict=True):
        assert torch.allclose(parameter.double(), a + 0.25 * (b - a), rtol=resolution, atol=resolution)


def test_the_optimizer_state_is_that_of_an_ordinary_step():
    parameters, optimizer = model_and_optimizer("adamw")
    take(parameters, optimizer, 0)
    line = line_of(optimizer)
    twin_parameters = copy.deepcopy(parameters)
    twin = torch.optim.AdamW(
        [{"params": twin_parameters[:1], "lr": 0.03}, {"params": twin_parameters[1:], "lr": 0.2}], weight_decay=0.3
    )
    twin.load_state_dict(optimizer.state_dict())
    for p, t in zip(parameters[:2], twin_parameters[:2], strict=True):
        p.grad = t.grad = torch.ones_like(p)
    line.begin()
    optimizer.step()
    line.move(0.1)
    twin.step()
    for p, t in zip(parameters[:2], twin_parameters[:2], strict=True):
        for key, value in twin.state[t].items():
            assert torch.equal(optimizer.state[p][key], value), key


def test_a_copied_step_is_taken_back_bit_for_bit():
    parameters, optimizer = model_and_optimizer("unknown", torch.float32)
    line = line_of(optimizer)
    old = [p.detach().clone() for p in parameters]
    for parameter in parameters[:2]:
        parameter.grad = torch.ones_like(parameter)
    line.begin()
    optimizer.step()
    line.move(0.3)
    line.move(0.0)
    assert all(torch.equal(p, o) for p, o in zip(parameters, old, strict=True))


def test_what_is_too_large_to_copy_is_refused():
    _, optimizer = model_and_optimizer("unknown")
    with pytest.raises(ValueError, match=r"the step of RMSprop cannot be pulled back .* use Adam, AdamW"):
        line_of(optimizer, copy_bytes=100)


def test_a_subclass_may_step_otherwise():
    class Mine(torch.optim.Adam):
        pass

    assert isinstance(line_of(Mine([torch.nn.Parameter(torch.zeros(2))])), CopiedLine)
