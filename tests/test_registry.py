"""Which class implements an op: override, fused twin, reference."""

import threading

import numpy as np
import pytest

from tinylm import Op, no_grad, ops, override, reference_only, registry, tensor
from tinylm.ops.softmax import Softmax
from tinylm.registry import fused


class Triple(Op):
    """3x. The tests replace it by classes that answer something else, so that one sees which ran."""

    def forward(self, x):
        return x * 3

    def backward(self, dy):
        return dy * 3


def replacement(factor, of=Triple, **attributes):
    """A class that multiplies by `factor`, forward and backward."""
    halves = {"forward": lambda self, x: x * factor, "backward": lambda self, dy: dy * factor}
    return type(f"Times{factor}", (of,), {**halves, **attributes})


def factor(x=2.0):
    """The factor of the class that is in force for `x`."""
    return Triple.apply(tensor(np.array(x))).item() / x


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_twins", {op: list(twins) for op, twins in registry._twins.items()})
    monkeypatch.setattr(registry, "_overrides", dict(registry._overrides))


def test_without_replacements_the_reference_runs():
    assert factor() == 3
    assert registry.implementation(Triple, [np.ones(1)], {}) is Triple


def test_a_twin_runs_forward_and_backward_and_keeps_its_own_name_in_the_graph():
    twin = fused(Triple)(replacement(30))
    x = tensor([2.0], requires_grad=True)
    y = Triple.apply(x)
    y.backward()
    assert type(y.op) is twin
    assert (y.item(), x.grad.item()) == (60, 30)


def test_a_twin_runs_only_where_it_supports_the_inputs():
    class OfFloat32(Triple):
        @classmethod
        def supports(cls, x, **params):
            return x.dtype == np.float32

        def forward(self, x):
            return x * 30

        def backward(self, dy):
            return dy * 30

    assert fused(Triple)(OfFloat32) is OfFloat32
    assert Triple.apply(tensor([1.0])).item() == 30
    assert Triple.apply(tensor(np.array([1.0]))).item() == 3


def test_supports_sees_raw_arrays_and_the_parameters():
    seen = []

    @fused(Softmax)
    class Twin(Softmax):
        @classmethod
        def supports(cls, *arrays, **params):
            seen.append((arrays, params))
            return False

        def forward(self, x):
            raise AssertionError

        def backward(self, dy):
            raise AssertionError

    x = tensor([[1.0, 2.0]])
    ops.softmax(x, axis=0)
    ((array,), params) = seen[0]
    assert array is x.data
    assert params == {"axis": 0}


def test_the_newest_twin_that_supports_the_inputs_wins():
    fused(Triple)(replacement(10))
    fused(Triple)(replacement(20))
    fused(Triple)(replacement(30, supports=classmethod(lambda cls, x: False)))
    assert factor() == 20


def test_a_twin_of_one_op_is_no_twin_of_another():
    fused(Softmax)(replacement(30, of=Softmax))
    assert factor() == 3
    assert ops.softmax(tensor([1.0]), axis=0).item() == 30


def test_reference_only_switches_twins_off_and_restores_even_after_an_exception():
    fused(Triple)(replacement(30))
    with reference_only():
        assert factor() == 3
        with reference_only():
            assert factor() == 3
        assert factor() == 3
    assert factor() == 30
    with pytest.raises(KeyError), reference_only():
        raise KeyError
    assert factor() == 30


def test_reference_only_is_for_this_thread_alone():
    fused(Triple)(replacement(30))
    found = []
    with reference_only():
        thread = threading.Thread(target=lambda: found.append(factor()))
        thread.start()
        thread.join(10)
        assert factor() == 3
    assert found == [30]


def test_an_override_wins_over_twins_and_reference_only():
    fused(Triple)(replacement(30))
    with override(Triple, replacement(7)):
        assert factor() == 7
        with reference_only():
            assert factor() == 7
    assert factor() == 30


def test_an_override_is_not_asked_what_it_supports():
    with override(Triple, replacement(7, supports=classmethod(lambda cls, x: False))):
        assert factor() == 7


def test_an_override_holds_in_every_thread():
    found = []
    with override(Triple, replacement(7)):
        thread = threading.Thread(target=lambda: found.append(factor()))
        thread.start()
        thread.join(10)
    assert found == [7]


def test_overrides_nest_and_are_restored_even_after_an_exception():
    with override(Triple, replacement(7)):
        with override(Triple, replacement(8)):
            assert factor() == 8
        assert factor() == 7
        with pytest.raises(KeyError), override(Triple, replacement(9)):
            raise KeyError
        assert factor() == 7
    assert factor() == 3
    assert Triple not in registry._overrides


def test_a_graph_keeps_the_class_it_was_recorded_with():
    x = tensor([2.0], requires_grad=True)
    with override(Triple, replacement(7)):
        y = Triple.apply(x)
    y.backward()
    assert x.grad.item() == 7


def test_an_override_runs_without_recording_too():
    with override(Triple, replacement(7)), no_grad():
        assert factor() == 7


@pytest.mark.parametrize(
    "wrong",
    [
        type("NoSubclass", (Op,), {"forward": lambda self, x: x, "backward": lambda self, dy: dy}),
        type("ForwardAlone", (Triple,), {"forward": lambda self, x: x}),
        type("BackwardAlone", (Triple,), {"backward": lambda self, dy: dy}),
        type("Nothing", (Triple,), {}),
        type("InheritsBoth", (replacement(7),), {}),
    ],
)
def test_a_class_that_is_no_replacement_is_refused(wrong):
    message = rf"{wrong.__name__} must subclass Triple and define both forward and backward"
    with pytest.raises(TypeError, match=message):
        fused(Triple)(wrong)
    with pytest.raises(TypeError, match=message), override(Triple, wrong):
        pass
    assert factor() == 3
    assert Triple not in registry._twins
