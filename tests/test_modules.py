"""nn.Module: containers, activations, named_modules, apply and buffers, compared with PyTorch's."""

import copy

import numpy as np
import pytest
import torch
from helpers import assert_close, check, distinct, host, normal

import tinylm
from tinylm import nn, optim
from tinylm.parallel import Workers, replica

ACTIVATIONS = {
    "ReLU": (nn.ReLU, torch.nn.ReLU),
    "GELU": (nn.GELU, lambda: torch.nn.GELU("tanh")),
    "Tanh": (nn.Tanh, torch.nn.Tanh),
    "Sigmoid": (nn.Sigmoid, torch.nn.Sigmoid),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(device, name):
    ours, theirs = (make() for make in ACTIVATIONS[name])
    check(device, ours, theirs, distinct(3, 4))
    assert list(ours.parameters()) == []
    assert repr(ours) == f"{name}()"


# --- Sequential and ModuleList ----------------------------------------------------------------------------------


def sequential(of):
    """The same net of tinylm's or of PyTorch's modules, the first activation used twice."""
    relu = of.ReLU()
    return of.Sequential(of.Linear(3, 4), relu, of.Sequential(of.Linear(4, 4), relu, of.Tanh()), of.Linear(4, 2))


def test_sequential_is_pytorchs(device):
    ours, theirs = sequential(nn), sequential(torch.nn)
    names = [name for name, _ in theirs.named_parameters()]
    assert [name for name, _ in ours.named_parameters()] == names
    assert [(n, type(m).__name__) for n, m in ours.named_modules()] == [
        (n, type(m).__name__) for n, m in theirs.named_modules()
    ]
    ours.load_state_dict({name: p.detach().numpy() for name, p in theirs.named_parameters()})
    ours.to(device.name)
    x = normal(5, 3).astype(np.float32)
    y, torch_y = ours(device.tensor(x)), theirs(torch.tensor(x))
    assert_close(y, torch_y.detach(), rtol=1e-5, atol=1e-6)
    y.sum().backward()
    torch_y.sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    assert nn.Sequential()(x) is x


@pytest.mark.parametrize("make", [nn.ModuleList, lambda modules: nn.Sequential(*modules)], ids=["list", "sequential"])
def test_a_container_is_a_list(make):
    a, b, c, d = (nn.Linear(1, n) for n in (1, 2, 3, 4))
    modules = make([a, b, c])
    assert (len(modules), list(modules)) == (3, [a, b, c])
    assert (modules[0], modules[-1]) == (a, c)
    assert type(modules[1:]) is type(modules)
    assert list(modules[1:]) == [b, c]
    assert next(name for name, _ in modules[1:].named_parameters()) == "0.weight"
    assert b in modules
    assert d not in modules
    modules.train()  # an attribute that is no module
    assert list(modules.append(d)) == [a, b, c, d]
    modules[-2] = a
    assert list(modules) == [a, b, a, d]
    assert list(make([]).extend([c, d])) == [c, d]
    for wrong in (lambda: modules[4], lambda: modules.__setitem__(4, a)):
        with pytest.raises(IndexError):
            wrong()
    for i in range(7):  # names in the order of the numbers, not of the letters: 10 comes after 9
        modules.append(nn.Linear(1, i + 5, bias=False))
    assert [p.shape[0] for n, p in modules.named_parameters() if n.endswith("weight")] == [1, 2, 4, *range(5, 12)]


def test_a_module_list_is_found_as_a_plain_list_is():
    class Plain(nn.Module):
        def __init__(self, blocks):
            self.blocks = blocks

    def names(blocks):
        return [name for name, _ in Plain(blocks).named_parameters()]

    blocks = [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))]
    assert names(blocks) == names(nn.ModuleList(blocks))
    assert names(blocks) == ["blocks.0.weight", "blocks.0.bias", "blocks.1.0.weight", "blocks.1.0.bias"]
    with pytest.raises(NotImplementedError, match="ModuleList has no forward"):
        nn.ModuleList(blocks)(1)


def test_a_containers_other_attributes_are_no_part_of_the_list():
    """But their parameters are the container's."""

    class Scaled(nn.Sequential):
        def __init__(self):
            super().__init__(nn.ReLU())
            self.other = nn.Linear(1, 1)

    assert len(Scaled()) == 1
    assert [name for name, _ in Scaled().named_parameters()] == ["other.weight", "other.bias"]


def test_a_sequential_is_trained():
    """XOR, which needs the layer between."""
    tinylm.random.seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1), nn.Sigmoid())
    x, y = tinylm.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]), tinylm.tensor([[0.0], [1.0], [1.0], [0.0]])
    optimizer = optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(300):
        model.zero_grad()
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
    assert f"{loss:.1f}" == "0.0"


# --- named_modules and apply ------------------------------------------------------------------------------------


class Ours(nn.Module):
    def __init__(self):
        self.first = nn.Linear(1, 1)
        self.blocks = nn.ModuleList([nn.Sequential(nn.ReLU(), nn.Linear(1, 1))])
        self.again = self.first


class Theirs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(1, 1)
        self.blocks = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(1, 1))])
        self.again = self.first


def named(model):
    return [(name, type(module).__name__.replace("Theirs", "Ours")) for name, module in model.named_modules()]


def applied(model):
    seen = []
    assert model.apply(seen.append) is model
    return [type(module).__name__.replace("Theirs", "Ours") for module in seen]


def test_named_modules_and_apply_are_pytorchs():
    """Each module once, under its first name; apply goes from the leaves to the root."""
    assert named(Ours()) == named(Theirs())
    assert applied(Ours()) == applied(Theirs())
    model = Ours()
    assert list(model.modules()) == [module for _, module in model.named_modules()]
    plain = nn.Module()
    plain.parts = {"a": [nn.ReLU()], "b": nn.Tanh()}
    assert named(plain) == [("", "Module"), ("parts.a.0", "ReLU"), ("parts.b", "Tanh")]


def test_apply_initialises_weights():
    def zero(module):
        if isinstance(module, nn.Linear):
            module.weight.data[...] = 0

    model = Ours().apply(zero)
    assert not model.first.weight.data.any()
    assert not model.blocks[0][1].weight.data.any()
    assert model.first.bias.data.any()


# --- buffers ----------------------------------------------------------------------------------------------------


class Counts(nn.Module):
    """A weight, a mask that never changes, and a mean that forward assigns anew."""

    def __init__(self):
        self.register_buffer("mask", np.tril(np.ones((2, 2), bool)))
        self.weight = nn.Parameter([1.0, 2.0])
        self.register_buffer("mean", tinylm.zeros(2))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(axis=0)
        return (x * self.weight).masked_fill(self.mask == 0, 0.0)


class Model(nn.Module):
    def __init__(self):
        self.parts = [Counts(), Counts()]


NAMES = ["parts.0.mask", "parts.0.mean", "parts.1.mask", "parts.1.mean"]


def test_a_buffer_is_a_tensor_that_shares_the_array_and_is_no_parameter():
    array = np.arange(3.0)
    module = nn.Module()
    module.register_buffer("table", array)
    assert isinstance(module.table, tinylm.Tensor)
    assert module.table.data is module.state_dict()["table"] is array
    assert not module.table.requires_grad
    assert list(module.parameters()) == []
    assert module.num_parameters() == 0
    module.register_buffer("weight", nn.Parameter([1.0]))
    assert not module.weight.requires_grad
    assert [name for name, _ in module.named_buffers()] == ["table", "weight"]


def test_buffers_are_found_under_their_dotted_names():
    model = Model()
    assert [name for name, _ in model.named_buffers()] == NAMES
    assert [id(x) for x in model.buffers()] == [id(x) for _, x in model.named_buffers()]
    assert [name for name, _ in model.named_parameters()] == ["parts.0.weight", "parts.1.weight"]
    assert list(model.state_dict()) == ["parts.0.weight", "parts.1.weight", *NAMES]
    model.parts[1].mean = model.parts[0].mean  # a tied one is there once
    assert [name for name, _ in model.named_buffers()] == NAMES[:3]


def test_the_names_in_a_state_dict_are_pytorchs():
    class Theirs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.ones(2))
            self.inner = torch.nn.Sequential(torch.nn.Linear(1, 1))
            self.inner[0].register_buffer("mean", torch.ones(2))

    class Ours(nn.Module):
        def __init__(self):
            self.register_buffer("mask", np.ones(2))
            self.inner = nn.Sequential(nn.Linear(1, 1))
            self.inner[0].register_buffer("mean", np.ones(2))

    assert set(Ours().state_dict()) == set(Theirs().state_dict())
    assert [n for n, _ in Ours().named_buffers()] == [n for n, _ in Theirs().named_buffers()]


def test_what_forward_assigns_is_the_buffer(device):
    model = Counts().to(device.name)
    x = device.tensor([[1.0, 2.0], [3.0, 4.0]])
    y = model(x)
    assert_close(y, [[1.0, 0.0], [3.0, 8.0]])
    assert_close(model.state_dict()["mean"], [0.2, 0.3], rtol=1e-6)
    y.sum().backward()
    assert_close(model.weight.grad, [4.0, 4.0])
    model.mean = device.array([5.0, 6.0], np.float32)  # an array becomes a Tensor
    assert isinstance(model.mean, tinylm.Tensor)
    assert dict(model.named_buffers())["mean"] is model.mean
    with pytest.raises(TypeError, match="a Tensor holds floats, integers or booleans, not object"):
        model.mean = None


def test_buffers_move_and_are_saved_and_loaded(device):
    source, target = Model(), Model().to(device.name)
    assert {x.device for x in target.buffers()} == {device.name}
    source.parts[1].mean = tinylm.tensor([7.0, 8.0])
    source.parts[0].mask.data[...] = False
    kept = dict(target.named_buffers())
    target.load_state_dict(source.state_dict())
    for name, x in target.named_buffers():
        assert x is kept[name]
        assert x.device == device.name
        assert_close(x, source.state_dict()[name])
    target.to("cpu").load_state_dict(copy.deepcopy(target).state_dict())


def test_loading_is_strict_about_buffers_too():
    model = Model()
    before = {name: a.copy() for name, a in model.state_dict().items()}
    state = {name: np.full_like(a, 7) for name, a in before.items()}
    del state["parts.0.mask"]
    state["parts.0.mean"] = np.zeros(3)
    state["parts.0.other"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"^load_state_dict: ") as caught:
        model.load_state_dict(state)
    for problem in ("missing parts.0.mask", "unexpected parts.0.other", "parts.0.mean is (3,), not (2,)"):
        assert problem in str(caught.value)
    for name, a in model.state_dict().items():
        np.testing.assert_array_equal(a, before[name])


@pytest.mark.parametrize("name", ["", "a.b", "0", "a b", None, 3])
def test_a_buffers_name_is_an_identifier(name):
    with pytest.raises(ValueError, match="register_buffer: the name must be an identifier, not"):
        nn.Module().register_buffer(name, np.ones(1))


@pytest.mark.parametrize("name", ["weight", "forward", "training", "to"])
def test_a_buffers_name_is_free(name):
    with pytest.raises(ValueError, match=f"register_buffer: Linear already has an attribute '{name}'"):
        nn.Linear(1, 1).register_buffer(name, np.ones(1))


def test_what_is_no_buffer_leaves_the_module_as_it_was():
    model = Counts()
    with pytest.raises(TypeError, match="a Tensor holds floats, integers or booleans, not object"):
        model.register_buffer("more", None)
    assert [name for name, _ in model.named_buffers()] == ["mask", "mean"]


def test_a_buffer_may_be_registered_again():
    model = Counts()
    model.register_buffer("mask", np.zeros(3))
    assert [name for name, _ in model.named_buffers()] == ["mean", "mask"]
    assert model.mask.shape == (3,)


def test_modules_do_not_share_their_buffers_names():
    assert list(nn.Module().named_buffers()) == []
    a, b = Counts(), Counts()
    a.register_buffer("more", np.ones(1))
    assert "more" not in b.state_dict()


def test_a_deep_copy_has_buffers_of_its_own():
    model = Model()
    other = copy.deepcopy(model)
    other.parts[0].mean.data[...] = 9
    assert_close(model.parts[0].mean, [0.0, 0.0])
    assert [name for name, _ in other.named_buffers()] == NAMES


def test_a_replica_shares_the_memory_of_buffers():
    """As it shares that of the weights: what is loaded into the model reaches the workers."""
    model = Model()
    other = replica(model)
    for x, y in zip(model.buffers(), other.buffers(), strict=True):
        assert x is not y
        assert x.data is y.data
    workers = Workers(model, 2)
    model.load_state_dict({name: np.ones_like(a) for name, a in model.state_dict().items()})
    with workers:
        assert workers.run(lambda rank: workers.models[rank].parts[0].mean.tolist()) == [[1.0, 1.0]] * 2
        workers.run(lambda rank: setattr(workers.models[rank].parts[0], "mean", tinylm.zeros(2)))
    assert_close(host(model.parts[0].mean), [1.0, 1.0])  # what a replica assigns stays in it
