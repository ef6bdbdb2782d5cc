"""Wrong arguments get one line that says what was expected."""

import inspect
import math

import numpy as np
import pytest

from tinylm import GPT, GPTConfig, Tensor, engines, fused, nn, ones, ops
from tinylm.data import CharTokenizer, get_batch

# --- PyTorch's words for an axis --------------------------------------------------------------------------------

WITH_AXIS = {
    f"{owner.__name__}.{name}": function
    for owner in (ops, Tensor)
    for name, function in vars(owner).items()
    if inspect.isfunction(function) and {"axis", "keepdims"} & set(inspect.signature(function).parameters)
}


def test_the_ops_with_an_axis_are_found():
    names = "sum mean max min var std logsumexp softmax log_softmax expand_dims squeeze split chunk"
    assert set(WITH_AXIS) >= {f"{owner}.{name}" for owner in ("tinylm.ops", "Tensor") for name in names.split()}
    assert set(WITH_AXIS) >= {"tinylm.ops.cat", "tinylm.ops.stack", "Tensor.argmax", "Tensor.unsqueeze"}


@pytest.mark.parametrize("name", WITH_AXIS)
@pytest.mark.parametrize(("word", "numpys"), [("dim", "axis"), ("keepdim", "keepdims")])
def test_pytorchs_word_for_an_axis_is_answered_with_numpys(name, word, numpys):
    function = WITH_AXIS[name]
    with pytest.raises(TypeError, match=rf"^{function.__name__}\(\) takes {numpys}=, as NumPy does, not {word}=$"):
        function(ones(2, 2), **{word: 0})


def test_other_wrong_keywords_stay_pythons():
    with pytest.raises(TypeError, match=r"sum\(\) got an unexpected keyword argument 'axes'"):
        ones(2).sum(axes=0)


# --- constructors -----------------------------------------------------------------------------------------------

NOT_SIZES = [None, 2.0, "3", True, [3], np.float64(3), np.array([3])]
NOT_FLAGS = [None, 1, "False", 0.5]
NOT_NUMBERS = [None, "0.5", True, [0.5]]
NOT_PROBABILITIES = [1.5, 1, -0.1, math.nan, math.inf, np.float32(1.5)]

# What is made, its arguments that work, then for each argument the values that must be refused.
CONSTRUCTORS = {
    "Linear": (nn.Linear, {"n_in": 3, "n_out": 2}, {"n_in": NOT_SIZES, "n_out": NOT_SIZES, "bias": NOT_FLAGS}),
    "Embedding": (nn.Embedding, {"n_rows": 3, "n_embd": 2}, {"n_rows": NOT_SIZES, "n_embd": NOT_SIZES}),
    "LayerNorm": (nn.LayerNorm, {"n_embd": 2}, {"n_embd": NOT_SIZES, "bias": NOT_FLAGS, "eps": NOT_NUMBERS}),
    "Dropout": (nn.Dropout, {"p": 0.5}, {"p": NOT_NUMBERS}),
    "GPTConfig": (
        GPTConfig,
        {"vocab_size": 5},
        {
            **dict.fromkeys(("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "recompute"), NOT_SIZES),
            "bias": NOT_FLAGS,
            "dropout": NOT_NUMBERS,
        },
    ),
}
WRONG_TYPES = [(who, name, x) for who, (_, _, all_) in CONSTRUCTORS.items() for name, xs in all_.items() for x in xs]
WRONG_VALUES = [
    *((who, name, n) for who, (_, given, _) in CONSTRUCTORS.items() for name in given if name != "p" for n in (0, -1)),
    *(("GPTConfig", name, 0) for name in ("block_size", "n_layer", "n_head", "n_embd")),
    *(("Dropout", "p", p) for p in NOT_PROBABILITIES),
    *(("GPTConfig", "dropout", p) for p in NOT_PROBABILITIES),
    *(("LayerNorm", "eps", eps) for eps in (-1e-5, math.nan)),
    ("GPTConfig", "recompute", -1),
]


def test_the_table_has_every_argument_of_the_constructors():
    for make, _, arguments in CONSTRUCTORS.values():
        assert set(arguments) == set(inspect.signature(make).parameters)


@pytest.mark.parametrize(
    ("error", "who", "name", "x"),
    [
        *((TypeError, *case) for case in WRONG_TYPES),
        *((ValueError, *case) for case in WRONG_VALUES),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else str(x),
)
def test_a_constructor_names_the_argument_that_is_wrong_and_what_it_saw(error, who, name, x):
    make, given, _ = CONSTRUCTORS[who]
    with pytest.raises(error, match=rf"^{who}: {name} must .*") as caught:
        make(**{**given, name: x})
    assert (repr(x) if error is TypeError else str(x)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numpys_numbers_are_numbers():
    assert nn.Linear(np.int64(3), np.int32(2), bias=np.bool(False)).weight.shape == (2, 3)
    assert nn.Dropout(np.float32(0.5)).p == nn.Dropout(0).p + 0.5
    assert GPTConfig(np.uint16(5), dropout=0).dropout == 0
    assert nn.LayerNorm(2, eps=0).eps == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GPT([[0, 1]]), r"GPT takes a GPTConfig, not list; write GPT\(GPTConfig\(vocab_size=...\)\)"),
        (lambda: GPT(None), "GPT takes a GPTConfig, not NoneType"),
        (lambda: nn.Sequential([nn.ReLU()]), "Sequential takes modules, not list"),
        (lambda: nn.Sequential(nn.ReLU), "Sequential takes modules, not type"),
        (lambda: nn.Sequential(ops.relu), "Sequential takes modules, not function"),
        (lambda: nn.ModuleList([None]), "ModuleList takes modules, not NoneType"),
        (lambda: nn.ModuleList().append(1), "ModuleList takes modules, not int"),
        (lambda: nn.Parameter(None), "a Tensor holds floats, integers or booleans, not object"),
        (lambda: CharTokenizer.of("ab").encode(None), "a tokenizer takes text as a str, not NoneType"),
        (lambda: CharTokenizer.of("ab").encode(b"ab"), "a tokenizer takes text as a str, not bytes"),
        (lambda: CharTokenizer(None), "a tokenizer takes text as a str, not NoneType"),
        (lambda: CharTokenizer(["a", "b"]), "a tokenizer takes text as a str, not list"),
    ],
)
def test_the_wrong_kind_of_object(make, message):
    with pytest.raises(TypeError, match="^" + message):
        make()


# --- calls ------------------------------------------------------------------------------------------------------

LAYERS = {
    "Linear": nn.Linear(3, 2),
    "Embedding": nn.Embedding(5, 2),
    "LayerNorm": nn.LayerNorm(3),
    "Dropout": nn.Dropout(0.5),
    "ReLU": nn.ReLU(),
    "GELU": nn.GELU(),
    "Tanh": nn.Tanh(),
    "Sigmoid": nn.Sigmoid(),
    "Sequential": nn.Sequential(nn.Linear(3, 2)),
    "GPT": GPT(GPTConfig(5, n_embd=4, n_layer=1, n_head=1)),
}


@pytest.mark.parametrize("engine", ["reference", "blocked"])
@pytest.mark.parametrize("x", [[[0, 1]], 2.0, 3, None, "text"], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_called_on_what_is_no_tensor_says_what_it_wants(name, x, engine):
    fused.register("blocked")
    with engines(engine), pytest.raises(TypeError, match=r"Tensor") as caught:
        LAYERS[name](x)
    assert type(x).__name__ in str(caught.value) or repr(x) in str(caught.value)


@pytest.mark.parametrize("name", ["Embedding", "GPT"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bool"])
def test_ids_are_integers(name, dtype):
    with pytest.raises(TypeError, match=f"^ids must be integers, not {dtype}"):
        LAYERS[name](Tensor(np.ones((1, 2), dtype)))


@pytest.mark.parametrize(
    ("tokens", "seen"),
    [
        (np.arange(20.0), "float64"),
        (np.arange(20, dtype=np.float16), "float16"),
        (np.ones(20, bool), "bool"),
        (list(range(20)), "list"),
        ("a text of twenty characters", "str"),
    ],
    ids=["float64", "float16", "bool", "list", "str"],
)
def test_tokens_are_an_array_of_integers(tokens, seen):
    """Floats would be truncated silently."""
    with pytest.raises(TypeError, match=f"^get_batch takes an array of integer tokens, not {seen}$"):
        get_batch(tokens, 2, 4, 0, 0)
