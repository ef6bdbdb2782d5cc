"""Wrong arguments get one line that says what was expected."""

import inspect

import pytest

from tinylm import Tensor, ones, ops

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
