"""nn: the layers compared with PyTorch's; names, weights, modes and devices of a Module."""

import array
import math

import numpy as np
import pytest
import torch
from helpers import assert_close, check, host, normal, shapes
from hypothesis import given
from hypothesis import strategies as st

import tinylm
from tinylm import gradcheck, nn


def check_layer(device, layer, torch_layer, x):
    """Value, and the gradients of the input and of every weight, against PyTorch's layer with the same weights."""
    names = [name for name, _ in layer.named_parameters()]
    assert names == [name for name, _ in torch_layer.named_parameters()]

    def fn(x, *weights):
        for name, w in zip(names, weights, strict=True):
            setattr(layer, name, w)
        return layer(x)

    def torch_fn(x, *weights):
        return torch.func.functional_call(torch_layer, dict(zip(names, weights, strict=True)), (x,))

    weights = [normal(*p.shape, seed=i) for i, p in enumerate(layer.parameters(), 1)]
    # Two nearly equal numbers in a row of a layer norm magnify float32's rounding.
    check(device, fn, torch_fn, x, *weights, tolerance={"rtol": 1e-3, "atol": 1e-3})


@given(shape=shapes(max_dims=2), n_in=st.integers(1, 4), n_out=st.integers(1, 4), bias=st.booleans())
def test_linear(device, shape, n_in, n_out, bias):
    check_layer(device, nn.Linear(n_in, n_out, bias), torch.nn.Linear(n_in, n_out, bias), normal(*shape, n_in))


@given(shape=shapes(max_dims=2), n=st.integers(1, 5), bias=st.booleans())
def test_layer_norm(device, shape, n, bias):
    check_layer(device, nn.LayerNorm(n, bias), torch.nn.LayerNorm(n, bias=bias), normal(*shape, n))


def test_the_eps_of_layer_norm(device):
    x = normal(2, 4)
    check_layer(device, nn.LayerNorm(4, eps=0.5), torch.nn.LayerNorm(4, eps=0.5), x)
    assert nn.LayerNorm(4).eps == torch.nn.LayerNorm(4).eps


@given(shape=shapes(), V=st.integers(1, 5), C=st.integers(1, 3))
def test_embedding(device, shape, V, C):
    check_layer(
        device, nn.Embedding(V, C), torch.nn.Embedding(V, C), np.asarray(abs(normal(*shape)) * 99, np.int64) % V
    )


def test_dropout_trains_and_evaluates(device):
    layer = nn.Dropout(0.5)
    x = device.leaf(np.ones((100, 10)), np.float32)
    y = layer(x)
    assert 0.4 < (host(y) == 0).mean() < 0.6
    assert layer.eval()(x) is x
    assert layer.train()(x) is not x

    def fn(x):
        tinylm.random.seed(0)
        return layer(x)

    gradcheck(fn, device.array(normal(3, 2)))


# --- initial weights --------------------------------------------------------------------------------------------


def test_initial_weights():
    """Linear: uniform within 1/sqrt(n_in), as PyTorch; Embedding: standard normal; LayerNorm: the identity."""
    linear = nn.Linear(400, 300)
    for p in linear.parameters():
        assert p.dtype == np.float32
        assert abs(p.data).max() <= 1 / math.sqrt(400)
        assert p.data.std() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.1)
        assert abs(p.data.mean()) < 0.01
    table = nn.Embedding(300, 100).weight.data
    assert table.mean() == pytest.approx(0, abs=0.02)
    assert table.std() == pytest.approx(1, abs=0.02)
    norm = nn.LayerNorm(3)
    assert_close(norm.weight, [1.0, 1.0, 1.0])
    assert_close(norm.bias, [0.0, 0.0, 0.0])


def test_initial_weights_depend_on_the_seed_alone():
    def weights(seed):
        tinylm.random.seed(seed)
        return [p.data for layer in (nn.Linear(3, 2), nn.Linear(3, 2), nn.Embedding(3, 2)) for p in layer.parameters()]

    first, again, other = weights(1), weights(1), weights(2)
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != c).all()
    assert (first[0] != first[2]).all()  # two layers of one shape do not start equal


# --- Module -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, n=2):
        self.norm = nn.LayerNorm(n, bias=False)
        self.scale = nn.Parameter(np.ones(n, np.float32))
        self.linear = nn.Linear(n, n)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.linear(self.norm(x))) * self.scale


class Model(nn.Module):
    """A table whose weight is also the last layer's, a list of blocks, and attributes that are no parameters."""

    def __init__(self):
        self.name = "model"
        self.table = nn.Embedding(3, 2)
        self.blocks = [Block(), Block()]
        self.between = nn.Parameter(np.zeros(2, np.float32))
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.table.weight
        self.plain = tinylm.tensor([1.0])
        self.nothing = None

    def forward(self, ids):
        x = self.table(ids) + self.between
        for block in self.blocks:
            x = block(x)
        return self.head(x)


NAMES = [
    "table.weight",
    *(f"blocks.{i}.{name}" for i in (0, 1) for name in ("norm.weight", "scale", "linear.weight", "linear.bias")),
    "between",
]


class Nested(nn.Module):
    """Parameters and modules in lists, tuples and dicts, within each other."""

    def __init__(self):
        self.gains = [nn.Parameter([1.0]), nn.Parameter([2.0])]
        self.heads = {"small": nn.Linear(2, 1), "large": [nn.Linear(2, 3), {"deep": (nn.Linear(2, 4, bias=False),)}]}
        self.tied = [self.gains[0]]
        self.other = {"text": "x", "numbers": [1, 2]}

    def forward(self, x):
        small, (large, deeper) = self.heads["small"], self.heads["large"]
        parts = [small(x), large(x), deeper["deep"][0](x)]
        return tinylm.ops.cat(parts, axis=-1) * self.gains[0] * self.tied[0] * self.gains[1]


def test_parameters_in_nested_lists_and_dicts_are_found_and_trained():
    model = Nested()
    assert [name for name, _ in model.named_parameters()] == [
        "gains.0",
        "gains.1",
        "heads.small.weight",
        "heads.small.bias",
        "heads.large.0.weight",
        "heads.large.0.bias",
        "heads.large.1.deep.0.weight",
    ]
    assert [name for name, _ in model.children()] == ["heads.small", "heads.large.0", "heads.large.1.deep.0"]
    before = {name: p.numpy().copy() for name, p in model.named_parameters()}
    optimizer = tinylm.optim.AdamW(model.parameters())
    model(tinylm.tensor([[1.0, 2.0]])).sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert (p.numpy() != before[name]).all(), name
    assert not any(module.training for module in model.eval().modules())
    model.load_state_dict(before)
    for name, p in model.named_parameters():
        np.testing.assert_array_equal(p.numpy(), before[name])
    assert "gains.1=(1,)" in repr(model)


def test_named_parameters_in_definition_order_and_tied_ones_once():
    model = Model()
    assert [name for name, _ in model.named_parameters()] == NAMES
    assert [id(p) for p in model.parameters()] == [id(p) for _, p in model.named_parameters()]
    assert dict(model.named_parameters())["table.weight"] is model.head.weight
    assert list(model.state_dict()) == NAMES


def test_num_parameters():
    assert Model().num_parameters() == 3 * 2 + 2 * (2 + 2 + 4 + 2) + 2
    assert nn.Linear(3, 4).num_parameters() == 16
    assert nn.Dropout(0.1).num_parameters() == 0


def test_a_tied_weight_collects_both_gradients(device):
    model = Model().eval().to(device.name)
    assert model.head.weight is model.table.weight
    model(device.array([0, 1])).sum().backward()
    grad = host(model.table.weight.grad)
    assert (grad[2] != 0).all()  # as a row of the head, though token 2 was never looked up
    assert all(p.grad is not None for p in model.parameters())


def test_train_and_eval_reach_everything_below():
    model = Model()
    everything = list(model.modules())
    assert len(everything) == 1 + 1 + 2 * 4 + 1
    assert all(m.training for m in everything)
    assert model.eval() is model
    assert not any(m.training for m in everything)
    assert model.train() is model
    assert all(m.training for m in everything)
    model.blocks[0].eval()
    assert [b.drop.training for b in model.blocks] == [False, True]
    assert not any(m.training for m in model.train(False).modules())


def test_zero_grad():
    model = Model()
    for p in model.parameters():
        p.grad = np.ones_like(p.data)
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_to_moves_every_parameter_and_its_gradient(device):
    model = Model()
    for p in model.parameters():
        p.grad = np.ones_like(p.data)
    before = list(model.parameters())
    assert model.to(device.name) is model
    after = list(model.parameters())
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert {p.device for p in after} == {device.name}
    assert {tinylm.Tensor(p.grad).device for p in after} == {device.name}
    assert {p.device for p in model.to("cpu").parameters()} == {"cpu"}


def test_repr_shows_the_tree():
    assert repr(nn.Linear(3, 4)) == "Linear(weight=(4, 3), bias=(4,))"
    assert repr(nn.Linear(3, 4, bias=False)) == "Linear(weight=(4, 3))"
    lines = repr(Model()).splitlines()
    assert lines[:4] == [
        "Model(between=(2,))",
        "  table: Embedding(weight=(3, 2))",
        "  blocks.0: Block(scale=(2,))",
        "    norm: LayerNorm(weight=(2,))",
    ]
    assert lines[-1] == "  head: Linear(weight=(3, 2))"


def test_a_module_without_forward():
    with pytest.raises(NotImplementedError, match="Module has no forward"):
        nn.Module()(1)


def test_a_parameter():
    p = nn.Parameter([1.0, 2.0])
    assert p.requires_grad
    assert p.is_leaf
    assert repr(p) == "Parameter([1., 2.], shape=(2,), dtype=float32, device=cpu, requires_grad=True)"
    with pytest.raises(TypeError, match="only a floating tensor can require a gradient"):
        nn.Parameter([1, 2])


@pytest.mark.parametrize("make", [tinylm.tensor, nn.Parameter])
@pytest.mark.parametrize("kind", ["array", "view", "Tensor", "mapped file", "float64"])
def test_tensor_and_parameter_copy_what_they_are_given(make, kind, tmp_path):
    """Two parameters made of one array must not train each other."""
    given = np.arange(6.0, dtype=np.float64 if kind == "float64" else np.float32).reshape(2, 3)
    if kind == "view":
        given = given[:, ::2]
    elif kind == "Tensor":
        given = tinylm.Tensor(given)
    elif kind == "mapped file":
        mapped = np.memmap(tmp_path / "file", np.float32, "w+", shape=given.shape)
        mapped[...] = given
        given = mapped
    a, b = make(given), make(given)
    raw = given.data if kind == "Tensor" else given
    for x, y in ((a.data, b.data), (a.data, raw), (b.data, raw)):
        assert not np.shares_memory(x, y)
    np.testing.assert_array_equal(a.data, raw)
    assert type(a.data) is np.ndarray
    assert a.dtype == (np.float64 if kind == "float64" and make is tinylm.tensor else np.float32)
    assert make(given, dtype=np.float64).dtype == np.float64


@pytest.mark.parametrize("make", [tinylm.tensor, nn.Parameter])
@pytest.mark.parametrize("theirs", [torch.ones(3), array.array("f", [1, 1, 1])], ids=["torch", "buffer"])
def test_what_shares_its_memory_with_others_is_copied(make, theirs):
    mine = make(theirs)
    mine.data *= 5
    assert list(theirs) == [1, 1, 1]


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize(
    "make", [lambda: np.matrix([[1.0, 2.0]]), lambda: np.ma.masked_array([1.0, 2.0], [True, False])]
)
def test_matrices_and_masked_arrays_are_refused(make):
    given = make()
    for use in (tinylm.tensor, tinylm.Tensor, nn.Parameter, lambda x: tinylm.tensor([1.0, 2.0]) * x):
        with pytest.raises(TypeError, match=f"takes plain arrays, not {type(given).__name__}; make one by np.asarray"):
            use(given)


# --- state_dict and load_state_dict -----------------------------------------------------------------------------


def test_state_round_trip(device):
    tinylm.random.seed(1)
    source = Model()
    tinylm.random.seed(2)
    target = Model().to(device.name)
    kept = dict(target.named_parameters())
    target.load_state_dict(source.state_dict())  # from the host to whichever device
    for name, p in target.named_parameters():
        assert p is kept[name]
        assert p.device == device.name
        assert_close(p, source.state_dict()[name])
    assert target.head.weight is target.table.weight


def test_what_is_loaded_is_copied():
    source, target = nn.Linear(2, 2), nn.Linear(2, 2)
    target.load_state_dict(source.state_dict())
    target.weight.data += 1
    assert not np.array_equal(source.weight.data, target.weight.data)


def test_state_dict_holds_the_live_arrays():
    linear = nn.Linear(2, 2)
    assert linear.state_dict()["weight"] is linear.weight.data


def test_loading_is_strict_and_reports_everything_at_once(device):
    model = Model().to(device.name)
    before = {name: host(p).copy() for name, p in model.named_parameters()}
    state = {name: np.full(p.shape, 7, np.float32) for name, p in model.named_parameters()}
    del state["between"], state["blocks.1.scale"]
    state["extra"] = np.zeros(1)
    state["blocks.2.scale"] = np.zeros(2)
    state["table.weight"] = np.zeros((2, 3))  # the right size, but not the shape
    state["blocks.0.linear.bias"] = np.zeros(1)  # would broadcast
    with pytest.raises(ValueError, match=r"^load_state_dict: ") as caught:
        model.load_state_dict(state)
    for problem in (
        "missing between",
        "missing blocks.1.scale",
        "unexpected extra",
        "unexpected blocks.2.scale",
        "table.weight is (2, 3), not (3, 2)",
        "blocks.0.linear.bias is (1,), not (2,)",
    ):
        assert problem in str(caught.value)
    assert str(caught.value).count(";") == 5
    for name, p in model.named_parameters():
        np.testing.assert_array_equal(host(p), before[name])


def test_loading_casts_to_the_models_dtype():
    linear = nn.Linear(2, 1)
    linear.load_state_dict({"weight": np.array([[1, 2]], np.float64), "bias": np.array([3], np.float16)})
    assert linear.weight.dtype == np.float32
    assert_close(linear.weight, [[1.0, 2.0]])
    assert_close(linear.bias, [3.0])
