"""AdamW, SGD, clipping and the schedule against PyTorch's."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from helpers import assert_close, host, normal, steps_of
from hypothesis import given
from hypothesis import strategies as st

from tinylm import GPT, GPTConfig, override, tensor
from tinylm.nn import Parameter
from tinylm.optim import SGD, AdamW, adamw, clip, clip_grad_norm_, decay_groups, sgd, warmup_cosine
from tinylm.optimizer import Optimizer

SHAPES = [(4, 3), (5,), (), (2, 3, 4)]


def pairs(device, shapes=SHAPES, dtype=np.float64):
    """The same parameters twice: ours on the device, PyTorch's."""
    values = [normal(*shape, seed=i).astype(dtype) for i, shape in enumerate(shapes)]
    return [Parameter(device.array(v), v.dtype) for v in values], [torch.tensor(v, requires_grad=True) for v in values]


def give(device, ours, theirs, gradients):
    """Set the gradients (None: missing) of both, to arrays of their own in the memory layout of the given ones."""
    for p, p_, g in zip(ours, theirs, gradients, strict=True):
        p.grad = None if g is None else device.array(g.copy("K"))
        p_.grad = None if g is None else torch.tensor(np.ascontiguousarray(g).reshape(g.shape))


def draw(step, shapes=SHAPES, scale=1.0, dtype=np.float64):
    return [scale * normal(*shape, seed=100 * step + i).astype(dtype) for i, shape in enumerate(shapes)]


def compare(ours, theirs, rtol=1e-12, atol=1e-14):
    for i, (p, p_) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(p, p_.detach().numpy(), rtol=rtol, atol=atol, what=f"parameter {i}")


# --- AdamW --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.1, "betas": (0.5, 0.9), "weight_decay": 0.3},
        {"lr": 1e-2, "weight_decay": 0.0},
        {"lr": 1e-2, "betas": (0.0, 0.99)},
        {"lr": 1e-2, "betas": (0.9, 0.0)},
        {"lr": 1e-2, "eps": 1e-2},
        {"lr": 0.0, "weight_decay": 0.5},
    ],
)
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-12), (np.float32, 2e-5)])
def test_12_steps_are_pytorchs(device, options, dtype, rtol):
    ours, theirs = pairs(device, dtype=dtype)
    optimizer, reference = AdamW(ours, **options), torch.optim.AdamW(theirs, **options)
    for step in range(12):
        give(device, ours, theirs, draw(step, dtype=dtype))
        optimizer.step()
        reference.step()
        compare(ours, theirs, rtol, rtol / 10)
    for p, p_ in zip(ours, theirs, strict=True):
        state = optimizer.state[p]
        assert state["step"] == 12
        assert_close(state["exp_avg"], reference.state[p_]["exp_avg"].numpy(), rtol=rtol, atol=rtol / 10)
        assert_close(state["exp_avg_sq"], reference.state[p_]["exp_avg_sq"].numpy(), rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("scale", [1e-12, 1e-9, 1e-8, 1e-5])
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_tiny_gradients_move_as_in_pytorch(device, scale, dtype, rtol):
    """A gradient no larger than eps shows the place of eps in the formula, and its value."""
    ours, theirs = pairs(device, dtype=dtype)
    for x, x_ in zip(ours, theirs, strict=True):  # from 0, so that no digit of the update is lost
        x.data[...] = 0
        x_.data[...] = 0
    optimizer = AdamW(ours, lr=0.1, weight_decay=0.0)
    reference = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.0)
    for step in range(10):
        give(device, ours, theirs, draw(step, scale=scale, dtype=dtype))
        optimizer.step()
        reference.step()
    assert host(ours[0]).any()
    compare(ours, theirs, rtol * 10, rtol * abs(host(ours[0])).max())


def test_the_first_step_by_hand(device):
    """m / (1 - beta1) = g and v / (1 - beta2) = g^2, so the step is lr * g / (|g| + eps), after the decay."""
    p = Parameter(device.array([2.0, -1.0]), np.float64)
    p.grad = device.array([4.0, -1e-8])
    AdamW([p], lr=0.1, weight_decay=0.5).step()
    assert_close(p, [2 * 0.95 - 0.1, -1 * 0.95 + 0.1 / 2], rtol=1e-9)


def test_a_parameter_without_a_gradient_stands_still_with_its_t(device):
    ours, theirs = pairs(device)
    optimizer = AdamW(ours, lr=0.1, weight_decay=0.3)
    reference = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.3)
    for step in range(10):
        gradients = draw(step)
        gradients[0] = None if step in (0, 1, 4) else gradients[0]
        gradients[1] = None
        before = host(ours[1]).copy()
        give(device, ours, theirs, gradients)
        optimizer.step()
        reference.step()
        compare(ours, theirs)
        assert (host(ours[1]) == before).all()
    assert optimizer.state[ours[0]]["step"] == 7
    assert ours[1] not in optimizer.state
    assert optimizer.state[ours[2]]["step"] == 10


def test_a_gradient_of_zeros_is_not_a_missing_one(device):
    ours, theirs = pairs(device)
    optimizer = AdamW(ours, lr=0.1, weight_decay=0.3)
    reference = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.3)
    for step in range(4):
        give(device, ours, theirs, draw(step, scale=0.0 if step in (0, 3) else 1.0))
        optimizer.step()
        reference.step()
        compare(ours, theirs)
    assert optimizer.state[ours[0]]["step"] == 4


def test_groups_have_their_own_lr_and_decay(device):
    ours, theirs = pairs(device)

    def groups(p):
        return [{"params": p[:1], "lr": 0.2, "weight_decay": 0.5}, {"params": p[1:2], "lr": 0.03}, {"params": p[2:]}]

    optimizer = AdamW(groups(ours), lr=0.01, weight_decay=0.1)
    reference = torch.optim.AdamW(groups(theirs), lr=0.01, weight_decay=0.1)
    assert optimizer.parameters() == ours
    for step in range(10):
        give(device, ours, theirs, draw(step))
        optimizer.step()
        reference.step()
        compare(ours, theirs)


def test_set_lr_and_zero_grad(device):
    ours, theirs = pairs(device)
    optimizer, reference = AdamW(ours), torch.optim.AdamW(theirs)
    for step in range(10):
        give(device, ours, theirs, draw(step))
        optimizer.set_lr(0.01 * step)
        for group in reference.param_groups:
            group["lr"] = 0.01 * step
        optimizer.step()
        reference.step()
        compare(ours, theirs)
    optimizer.zero_grad()
    assert [p.grad for p in ours] == [None] * 4


def test_gradients_need_not_be_contiguous(device):
    shapes = [(4, 6), (6, 4), (24,), (3, 2, 4)]
    ours, theirs = pairs(device, shapes)
    optimizer, reference = AdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    for step in range(10):
        full = normal(6, 4, seed=step)
        layouts = [full.T, full[::-1], normal(48, seed=step)[::2], normal(4, 2, 3, seed=step).T]
        give(device, ours, theirs, layouts)
        ours[1].grad = device.array(full)[::-1]
        ours[2].grad = device.array(normal(48, seed=step))[::2]
        assert not any(p.grad.flags.c_contiguous for p in ours)
        optimizer.step()
        reference.step()
        compare(ours, theirs)


def test_parameters_need_not_be_contiguous(device):
    """Pieces of a contiguous array are views; pieces of any other would be copies, and the update would be lost."""
    ours, theirs = pairs(device, [(6, 4)])
    ours[0].data = device.array(host(ours[0]).T.copy()).T
    optimizer, reference = AdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    for step in range(10):
        give(device, ours, theirs, draw(step, [(6, 4)]))
        optimizer.step()
        reference.step()
        compare(ours, theirs)


def test_a_step_works_in_place_and_leaves_the_gradients_alone(device):
    ours, theirs = pairs(device)
    optimizer = AdamW(ours)
    give(device, ours, theirs, draw(0))
    data, grads = [p.data for p in ours], [p.grad for p in ours]
    for _ in range(2):
        optimizer.step()
    for p, d, g, value in zip(ours, data, grads, draw(0), strict=True):
        assert p.data is d
        assert p.grad is g
        np.testing.assert_array_equal(host(p.grad), value)


def test_matrices_decay_and_vectors_do_not():
    model = GPT(GPTConfig(vocab_size=5, block_size=4, n_layer=1, n_head=1, n_embd=4))
    optimizer = AdamW(decay_groups(model, 0.1), lr=0.5)
    assert sorted(map(id, optimizer.parameters())) == sorted(map(id, model.parameters()))
    before = {name: p.numpy().copy() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = np.zeros_like(p.data)  # then only the decay moves them
    optimizer.step()
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.numpy(), before[name] * (1 - 0.5 * 0.1 * (p.ndim == 2)), rtol=1e-6)


# --- SGD ----------------------------------------------------------------------------------------------------------


@given(
    st.sampled_from([0.0, 0.01, 0.3]),
    st.sampled_from([(0.0, False), (0.5, False), (0.9, False), (0.9, True), (1.0, True)]),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([1.0, 0.25]),
    st.sampled_from([(np.float64, 1e-12), (np.float32, 1e-4)]),
    st.lists(st.sets(st.integers(0, 3)), min_size=12, max_size=12),
)
def test_12_steps_of_sgd_are_pytorchs(device, lr, momentum, decay, coefficient, kind, missing):
    """With clipping's coefficient, a frozen parameter, and in each step some parameters without a gradient."""
    dtype, rtol = kind
    options = {"lr": lr, "momentum": momentum[0], "nesterov": momentum[1], "weight_decay": decay}
    ours, theirs = pairs(device, dtype=dtype)
    ours[2].requires_grad = theirs[2].requires_grad = False
    optimizer, reference = SGD(ours, **options), torch.optim.SGD(theirs, **options)
    for step in range(12):
        gradients = [None if i == 2 or i in missing[step] else g for i, g in enumerate(draw(step, dtype=dtype))]
        give(device, ours, theirs, gradients)
        for p_ in theirs:
            if p_.grad is not None:
                p_.grad *= coefficient
        optimizer.step(coefficient)
        reference.step()
        compare(ours, theirs, rtol, rtol)
    for i, (p, p_) in enumerate(zip(ours, theirs, strict=True)):
        taken = 0 if i == 2 else sum(i not in absent for absent in missing)
        state = optimizer.state.get(p, {"step": 0})
        assert state["step"] == taken
        buffer = reference.state[p_].get("momentum_buffer") if momentum[0] else None
        assert ("momentum_buffer" in state) == (buffer is not None)
        if buffer is not None:
            assert_close(state["momentum_buffer"], buffer.numpy(), rtol=rtol, atol=rtol)


def test_groups_of_sgd_differ_in_any_option(device):
    ours, theirs = pairs(device)

    def groups(p):
        return [
            {"params": p[:1], "momentum": 0.5, "weight_decay": 0.3},
            {"params": p[1:2], "momentum": 0.0, "lr": 0.2},
            {"params": p[2:], "nesterov": True},
        ]

    options = {"lr": 0.1, "momentum": 0.9}
    optimizer, reference = SGD(groups(ours), **options), torch.optim.SGD(groups(theirs), **options)
    for step in range(10):
        give(device, ours, theirs, draw(step))
        optimizer.step()
        reference.step()
        compare(ours, theirs)
    assert [len(optimizer.state[p]) for p in ours] == [2, 1, 2, 2]


def test_momentum_and_betas_may_change_between_steps(device):
    """So works a schedule of the momentum. Without momentum the buffer rests."""
    ours, theirs = pairs(device)
    optimizer, reference = SGD(ours, lr=0.1), torch.optim.SGD(theirs, lr=0.1)
    for step in range(9):
        for o in (optimizer, reference):
            o.param_groups[0]["momentum"] = (0.0, 0.9, 0.5)[step // 2 % 3]
        give(device, ours, theirs, draw(step))
        optimizer.step()
        reference.step()
        compare(ours, theirs)
    ours, theirs = pairs(device)
    groups = [[{"params": p[:2]}, {"params": p[2:3], "betas": (0.5, 0.8)}, {"params": p[3:]}] for p in (ours, theirs)]
    optimizer, reference = AdamW(groups[0]), torch.optim.AdamW(groups[1])
    for step in range(6):
        for o in (optimizer, reference):
            o.param_groups[0]["eps"] = 10.0**-step
        give(device, ours, theirs, draw(step))
        optimizer.step()
        reference.step()
        compare(ours, theirs)


# --- what all optimizers share --------------------------------------------------------------------------------------

MAKERS = {
    "AdamW": lambda params: AdamW(params, lr=0.1, betas=(0.8, 0.9)),
    "SGD": lambda params: SGD(params, lr=0.1, weight_decay=0.1),
    "momentum": lambda params: SGD(params, lr=0.1, momentum=0.9),
}
each_optimizer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


class Signs(Optimizer):
    """An optimizer of one's own: the least that it takes."""

    moments = ("last",)

    def __init__(self, params, lr=0.1, weight_decay=0.0, beta=0.5):
        super().__init__(params, lr, weight_decay, beta=beta)

    def update(self, lists, options, coefficient):
        for p, g, last, t, lr, decay in zip(*lists, strict=True):
            p -= lr * (t * np.sign(g * coefficient) + options["beta"] * last + decay)
            last[...] = np.sign(g)


def test_an_optimizer_of_ones_own():
    p = Parameter([1.0, -1.0])
    optimizer = Signs([{"params": [p], "weight_decay": 1.0}], lr=0.5)
    for _ in range(2):
        p.grad = np.float32([3, -2])
        optimizer.step()
    np.testing.assert_array_equal(p.data, np.float32([-1.75, -0.25]))
    assert optimizer.state_dict()["param_groups"] == [{"params": [0], "lr": 0.5, "weight_decay": 1.0, "beta": 0.5}]
    with pytest.raises(NotImplementedError, match="Optimizer has no update"):
        Optimizer([p], 0.1, 0.0).step()


def test_a_group_with_its_own_lr_keeps_its_ratio_as_with_a_scheduler_of_pytorch(device):
    ours, theirs = pairs(device)
    groups = [[{"params": p[:1], "lr": 0.03}, {"params": p[1:]}] for p in (ours, theirs)]
    optimizer, reference = AdamW(groups[0], lr=0.1), torch.optim.AdamW(groups[1], lr=0.1)
    factors = [1.0, 0.7, 0.2, 0.0, 1.3]
    schedule = torch.optim.lr_scheduler.LambdaLR(reference, lambda step: factors[step])
    for step, factor in enumerate(factors):
        optimizer.set_lr(0.1 * factor)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([group["lr"] for group in reference.param_groups], rel=1e-15)
        give(device, ours, theirs, draw(step))
        optimizer.step()
        reference.step()
        compare(ours, theirs)
        if step + 1 < len(factors):
            schedule.step()


@pytest.mark.parametrize("lr", [0.1, 1 / 3, 6e-3 * 0.7, 0.0])
def test_equal_rates_are_set_bit_for_bit(lr):
    p, q = Parameter([1.0]), Parameter([1.0])
    optimizer = AdamW([{"params": [p], "lr": 1e-3}, {"params": [q]}], lr=1e-3)
    optimizer.set_lr(lr)
    assert [group["lr"] for group in optimizer.param_groups] == [lr, lr]


def test_an_lr_of_0_has_no_ratio():
    p, q = Parameter([1.0]), Parameter([1.0])
    AdamW([{"params": [p], "lr": 0.0}, {"params": [q]}], lr=0.0).set_lr(0.1)
    optimizer = AdamW([{"params": [p], "lr": 0.1}, {"params": [q]}], lr=0.0)  # trains p only
    with pytest.raises(
        ValueError, match=r"AdamW.set_lr: a group's own lr has no ratio to the optimizer's, which was 0"
    ):
        optimizer.set_lr(0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.0]


def trained(make, device, steps=3):
    """An optimizer after some steps; parameter 1 never had a gradient."""
    ours, _ = pairs(device)
    optimizer = make([{"params": ours[:2], "weight_decay": 0.3}, {"params": ours[2:], "lr": 0.2}])
    more_steps(optimizer, device, 0, steps)
    return optimizer


def more_steps(optimizer, device, first, last):
    for step in range(first, last):
        for i, p in enumerate(optimizer.parameters()):
            p.grad = None if i == 1 else device.array(normal(*p.shape, seed=100 * step + i))
        optimizer.step()


def snapshot(optimizer):
    return copy.deepcopy(optimizer.state_dict())


def same(a, b):
    np.testing.assert_equal(to_host(a), to_host(b))


def to_host(state):
    hosted = {i: {k: x if k == "step" else host(x) for k, x in entry.items()} for i, entry in state["state"].items()}
    return {**state, "state": hosted}


@each_optimizer
def test_a_state_that_is_loaded_continues_bit_for_bit(device, make):
    first = trained(make, device)
    state, before = snapshot(first), snapshot(first)
    copies = [Parameter(p, np.float64) for p in first.parameters()]
    second = make([{"params": copies[:2]}, {"params": copies[2:], "lr": 9.0}])
    groups = json.loads(json.dumps(state["param_groups"]))  # as from a file
    second.load_state_dict({"state": state["state"], "param_groups": groups})
    same(second.state_dict(), state)
    more_steps(first, device, 3, 6)
    assert (host(copies[0]) != host(first.parameters()[0])).any()
    more_steps(second, device, 3, 4)
    same(state, before)  # it was copied
    more_steps(second, device, 4, 6)
    same(second.state_dict(), first.state_dict())
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        np.testing.assert_array_equal(host(p), host(q))


@each_optimizer
def test_its_state_has_the_structure_of_pytorchs_and_is_live(device, make):
    optimizer = trained(make, device)
    state = optimizer.state_dict()
    theirs = [torch.zeros(s, requires_grad=True) for s in SHAPES]
    groups = [{"params": theirs[:2]}, {"params": theirs[2:]}]
    reference = torch.optim.AdamW(groups) if make is MAKERS["AdamW"] else torch.optim.SGD(groups, momentum=0.9)
    for p in theirs:
        p.grad = None if p is theirs[1] else torch.ones_like(p)
    reference.step()
    expected = reference.state_dict()
    assert set(state) == set(expected)
    assert list(state["state"]) == list(expected["state"]) == [0, 2, 3]
    for ours, group in zip(state["param_groups"], expected["param_groups"], strict=True):
        assert ours["params"] == group["params"]
        assert set(ours) <= set(group)
    for i, entry in state["state"].items():
        assert set(entry) - {"step"} <= set(expected["state"][i])
        assert entry["step"] == 3
        for name in entry.keys() - {"step"}:
            assert entry[name] is optimizer.state[optimizer.parameters()[i]][name]
    optimizer.load_state_dict(state)  # its own
    same(optimizer.state_dict(), state)


SPOILS = {
    "a key": (lambda s: s.pop("state"), "the keys must be state and param_groups, not param_groups"),
    "a group missing": (lambda s: s["param_groups"].pop(), "the groups, or the names of their options"),
    "a parameter missing": (lambda s: s["param_groups"][0]["params"].pop(), "the groups, or the names"),
    "no params": (lambda s: s["param_groups"][0].pop("params"), "the groups, or the names"),
    "other places": (lambda s: s["param_groups"][0]["params"].reverse(), "the groups, or the names"),
    "an option missing": (lambda s: s["param_groups"][1].pop("eps"), "the groups, or the names"),
    "an option unknown": (lambda s: s["param_groups"][1].update(momentum=0.9), "the groups, or the names"),
    "lr": (lambda s: s["param_groups"][1].update(lr=math.nan), "AdamW: lr must be a finite number .*, not nan"),
    "betas": (lambda s: s["param_groups"][1].update(betas=[0.9]), r"betas must be two numbers, .*, not \(0.9,\)"),
    "a parameter unknown": (lambda s: s["state"].update({4: s["state"][3]}), "there is no parameter 4"),
    "a name": (lambda s: s["state"].update({"3": s["state"][3]}), "there is no parameter '3'"),
    "a moment missing": (lambda s: s["state"][3].pop("exp_avg"), r"parameter 3 has \{'exp_avg_sq': \(2, 3, 4\)\}"),
    "all moments missing": (lambda s: s["state"].update({3: {"step": 3}}), r"parameter 3 has \{\}, not \{'exp_avg'"),
    "a moment unknown": (lambda s: s["state"][3].update(momentum_buffer=s["state"][3]["exp_avg"]), "parameter 3 has"),
    "a shape": (lambda s: s["state"][0].update(exp_avg=np.ones((3, 4))), r"parameter 0 has \{'exp_avg': \(3, 4\)"),
    "one that would broadcast": (lambda s: s["state"][0].update(exp_avg=np.ones(3)), "parameter 0 has"),
    "no step": (lambda s: s["state"][3].pop("step"), "parameter 3 has the step None"),
    "a negative step": (lambda s: s["state"][3].update(step=-1), "parameter 3 has the step -1"),
    "half a step": (lambda s: s["state"][3].update(step=0.5), "parameter 3 has the step 0.5"),
    "two faults": (lambda s: (s["state"][0].pop("step"), s["state"][3].pop("step")), "parameter 0 .*; parameter 3 "),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_state_that_does_not_match_is_refused_whole(device, spoil):
    change, message = SPOILS[spoil]
    optimizer = trained(MAKERS["AdamW"], device)
    before, other = snapshot(optimizer), snapshot(trained(MAKERS["AdamW"], device, steps=5))
    other["param_groups"][0]["lr"] = 7.0
    change(other)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(other)
    same(optimizer.state_dict(), before)


def test_the_state_of_another_optimizer_is_refused(device):
    states = [snapshot(trained(make, device)) for make in MAKERS.values()]
    for i, make in enumerate(MAKERS.values()):
        for j, state in enumerate(states):
            if 0 in (i, j) and i != j:
                with pytest.raises(ValueError, match="load_state_dict: the groups, or the names of their options"):
                    trained(make, device).load_state_dict(state)
    plain = states[1]
    for group in plain["param_groups"]:
        group["momentum"] = 0.9
    with pytest.raises(ValueError, match=r"SGD.load_state_dict: parameter 0 has \{\}, not \{'momentum_buffer'"):
        trained(MAKERS["momentum"], device).load_state_dict(plain)


def test_a_group_may_be_a_generator():
    model = GPT(GPTConfig(vocab_size=5, block_size=4, n_layer=1, n_head=1, n_embd=4))
    optimizer = SGD([{"params": model.parameters()}])
    assert all(a is b for a, b in zip(optimizer.parameters(), model.parameters(), strict=True))


def bare(*names):
    """Each name a Parameter, the same name the same one."""
    made = {}
    return [made.setdefault(name, Parameter([1.0])) for name in names]


BAD_NUMBERS = [-1e-9, -1.0, math.nan, math.inf, -math.inf, "0.1", None, np.ones(1), 1j]
REFUSED = {
    "nothing": (ValueError, [], {}, "got no parameters"),
    "an empty group": (ValueError, [{"params": []}], {}, "got no parameters"),
    "twice": (ValueError, bare("p", "p"), {}, "got a parameter twice"),
    "in two groups": (ValueError, [{"params": ps} for ps in [bare("p")] * 2], {}, "got a parameter twice"),
    "one parameter": (
        TypeError,
        Parameter([1.0]),
        {},
        r"takes a list of Parameters or of groups, .*, not one Parameter",
    ),
    "a module": (TypeError, GPT(GPTConfig(5, 4, n_layer=1, n_head=1, n_embd=4)), {}, "not one GPT"),
    "a group": (TypeError, {"params": bare("p")}, {}, "not one dict"),
    "a group of one": (TypeError, [{"params": Parameter([1.0])}], {}, "not one Parameter"),
    "an array": (TypeError, [np.ones(3)], {}, "updates Parameters, not ndarray"),
    "a string": (TypeError, "weight", {}, "updates Parameters, not str"),
    "names": (TypeError, [("weight", *bare("p"))], {}, "updates Parameters, not tuple"),
    "a group among parameters": (TypeError, [*bare("p"), {"params": bare("q")}], {}, "updates Parameters, not dict"),
    "a parameter among groups": (
        ValueError,
        [{"params": bare("p")}, *bare("q")],
        {},
        "a group is a dict .*, not Param",
    ),
    "a result": (ValueError, [bare("p")[0] * 2], {}, "not what Mul made: it gets no gradient"),
    "no params": (ValueError, [{"lr": 0.1}], {}, r"a group is a dict with the key 'params', not one with .* \['lr'\]"),
    "misspelt": (
        ValueError,
        [{"params": bare("p"), "weight_decey": 0.1}],
        {},
        "a group has no option 'weight_decey'; it has lr, weight_decay,",
    ),
    **{
        f"{name}={x!r}": (ValueError, bare("p"), {name: x}, f"{name} must be a finite number and not negative, not ")
        for name in ("lr", "weight_decay")
        for x in BAD_NUMBERS
    },
    **{
        f"a group's {name}={x!r}": (ValueError, [{"params": bare("p"), name: x}], {}, f"{name} must be a finite")
        for name in ("lr", "weight_decay")
        for x in BAD_NUMBERS
    },
}
ADAMW_REFUSES = {
    **{f"eps={x!r}": (ValueError, bare("p"), {"eps": x}, "AdamW: eps must be a finite number") for x in BAD_NUMBERS},
    **{
        f"betas={betas!r}": (
            ValueError,
            bare("p"),
            {"betas": betas},
            "AdamW: betas must be two numbers, at least 0 and",
        )
        for x in [1.0, 1.5, *BAD_NUMBERS]
        for betas in [(0.9, x), (x, 0.9), x, (0.9,), (0.9, 0.9, 0.9)]
    },
}
SGD_REFUSES = {
    "nesterov": (ValueError, bare("p"), {"nesterov": True}, "SGD: nesterov needs a momentum greater than 0"),
    "an option of AdamW": (ValueError, [{"params": bare("p"), "eps": 1}], {}, "SGD: a group has no option 'eps'"),
    **{f"momentum={x!r}": (ValueError, bare("p"), {"momentum": x}, "SGD: momentum must be") for x in BAD_NUMBERS},
}


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        *((kind, case) for kind in (AdamW, SGD) for case in REFUSED.values()),
        *((AdamW, case) for case in ADAMW_REFUSES.values()),
        *((SGD, case) for case in SGD_REFUSES.values()),
    ],
    ids=[*(f"{kind}: {x}" for kind in ("AdamW", "SGD") for x in REFUSED), *ADAMW_REFUSES, *SGD_REFUSES],
)
def test_what_an_optimizer_refuses(kind, case):
    error, params, options, message = case
    with pytest.raises(error, match=message) as caught:
        kind(params, **options)
    assert str(caught.value).startswith(kind.__name__)
    assert "\n" not in str(caught.value)


@each_optimizer
@pytest.mark.parametrize("lr", BAD_NUMBERS, ids=repr)
def test_set_lr_refuses_it_and_changes_nothing(make, lr):
    optimizer = make(bare("p", "q"))
    with pytest.raises(ValueError, match="lr must be a finite number and not negative, not "):
        optimizer.set_lr(lr)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_any_leaf_is_a_parameter_and_numpy_numbers_are_numbers():
    w = tensor([1.0], requires_grad=True)
    optimizer = SGD([w], lr=np.float32(0.5), momentum=np.float64(0.5))
    optimizer.set_lr(np.float64(0.25))
    (w * 2).sum().backward()
    optimizer.step()
    assert w.item() == 0.5


# --- clip_grad_norm_ ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-12), (np.float32, 1e-5)])
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 5.0, 1e3])
@pytest.mark.parametrize("missing", [(), (0,), (1, 3)])
def test_clipping_is_pytorchs(device, dtype, rtol, max_norm, missing):
    ours, theirs = pairs(device, dtype=dtype)
    gradients = [None if i in missing else g for i, g in enumerate(draw(0, dtype=dtype))]
    give(device, ours, theirs, gradients)
    arrays = [p.grad for p in ours]
    norm = clip_grad_norm_((p for p in ours), max_norm)  # an iterator will do
    assert type(norm) is float
    assert math.isclose(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm).item(), rel_tol=rtol)
    for p, p_, g, a in zip(ours, theirs, gradients, arrays, strict=True):
        assert p.grad is a  # in place
        if g is not None:
            assert_close(p.grad, p_.grad.numpy(), rtol=rtol)
            assert p.grad.dtype == dtype
            assert max_norm < norm or (host(p.grad) == g).all()  # below the limit not a bit changes
    if missing == () and max_norm < norm:
        after = math.sqrt(sum((host(p.grad) ** 2).sum() for p in ours))
        assert math.isclose(after, max_norm, rel_tol=1e-4 if max_norm > 1e-2 else 1e-2)


def test_one_factor_for_all_and_not_one_for_each(device):
    a, b = Parameter(device.array([0.0])), Parameter(device.array([0.0]))
    a.grad, b.grad = device.array([3.0]), device.array([4.0])
    assert clip_grad_norm_([a, b], 2.5) == 5
    assert_close(a.grad, [1.5], rtol=1e-6)
    assert_close(b.grad, [2.0], rtol=1e-6)


def test_nothing_to_clip(device):
    p = Parameter(device.array([1.0]))
    assert clip_grad_norm_([p], 1.0) == 0.0
    assert clip_grad_norm_([], 1.0) == 0.0
    p.grad = device.array([0.0])
    assert clip_grad_norm_([p], 1.0) == 0.0
    assert clip_grad_norm_([p], 0.0) == 0.0
    assert host(p.grad)[0] == 0
    p.grad = device.array(np.zeros(0))
    assert clip_grad_norm_([p], 1.0) == 0.0


def test_an_infinite_limit_only_measures(device):
    p = Parameter(device.array([1.0, 1.0]))
    p.grad = device.array([30.0, -40.0])
    assert clip_grad_norm_([p], math.inf) == 50
    np.testing.assert_array_equal(host(p.grad), [30, -40])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [1e19, 1e25, 3e38])
def test_squares_that_overflow_float32(device, size):
    shapes = [(3, 4), (5,)]
    ours, _ = pairs(device, shapes, np.float32)
    gradients = [(size * np.sign(g) * (0.5 + np.tanh(abs(g)) / 3)).astype(np.float32) for g in draw(0, shapes)]
    for p, g in zip(ours, gradients, strict=True):
        p.grad = device.array(g.copy())
    exact = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients))
    norm = clip_grad_norm_(ours, 1.0)
    assert math.isclose(norm, exact, rel_tol=1e-5)
    for p, g in zip(ours, gradients, strict=True):
        assert_close(p.grad, g.astype(np.float64) / exact, rtol=1e-5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_norm_that_is_not_finite_is_reported_and_nothing_is_scaled(device, bad, place, dtype):
    shapes = [(3,), (2, 2), (4,)]
    ours, theirs = pairs(device, shapes, dtype)
    gradients = draw(0, shapes, dtype=dtype)
    gradients[place].flat[-1] = bad
    give(device, ours, theirs, gradients)
    norm = clip_grad_norm_(ours, 1.0)
    assert math.isnan(norm) if math.isnan(bad) else norm == math.inf
    for p, g in zip(ours, gradients, strict=True):
        np.testing.assert_array_equal(host(p.grad), g)


def test_gradients_that_are_not_contiguous_are_clipped_in_place(device):
    p = Parameter(device.array(np.zeros((3, 2))))
    memory = device.array(np.arange(6.0).reshape(2, 3))
    p.grad = memory.T
    norm = clip_grad_norm_([p], 1.0)
    assert math.isclose(norm, math.sqrt(55))
    assert_close(p.grad, np.arange(6.0).reshape(2, 3).T / norm, rtol=1e-6)
    assert_close(memory, np.arange(6.0).reshape(2, 3) / norm, rtol=1e-6)


def test_a_single_parameter_is_clipped_as_in_pytorch(device):
    p = Parameter(device.array(np.zeros((2, 2))))
    for measured in (lambda: clip_grad_norm_(p, 1.0), lambda: clip(p, 1.0)[0]):
        p.grad = device.array(np.full((2, 2), 4.0))
        assert measured() == 8
    assert clip(p, 1.0)[1] == pytest.approx(1 / 8)
    clip_grad_norm_(p, 1.0)
    assert_close(p.grad, np.full((2, 2), 0.5), rtol=1e-6)


@pytest.mark.parametrize("max_norm", [-1, -1e-9, -math.inf, math.nan])
@pytest.mark.parametrize("function", [clip, clip_grad_norm_])
def test_a_limit_that_makes_no_sense_is_refused(device, function, max_norm):
    p = Parameter(device.array([0.0]))
    p.grad = device.array([3.0])
    with pytest.raises(ValueError, match="clip_grad_norm_: max_norm must be at least 0, not "):
        function([p], max_norm)
    assert host(p.grad)[0] == 3


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("size", "n"), [(1.0, 100_000), (300.0, 70_000), (60_000.0, 5), (1e-4, 7), (1.0, 3001)])
def test_the_norm_of_float16_gradients_is_summed_in_float32(device, size, n):
    p = Parameter(device.array(np.zeros(n)), np.float16)
    values = (size * (0.5 + np.arange(n) % 7 / 14)).astype(np.float16)
    p.grad = device.array(values)
    norm = clip_grad_norm_([p], math.inf)
    assert norm == pytest.approx(np.linalg.norm(values.astype(np.float64)), rel=1e-5)
    assert p.grad.dtype == np.float16


# --- warmup_cosine ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "warmup", "min_lr"),
    [(20, 5, 0.0), (20, 5, 0.01), (30, 0, 0.02), (7, 1, 0.0), (10, 9, 0.001), (1, 0, 0.0)],
)
def test_the_schedule_is_pytorchs(steps, warmup, min_lr):
    lr = 0.1
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup, eta_min=min_lr)
    schedule = cosine
    if warmup:
        line = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [line, cosine], [warmup])
    for step in range(steps + 1):  # PyTorch's cosine rises again after its end
        expected = optimizer.param_groups[0]["lr"]
        assert math.isclose(warmup_cosine(step, steps, lr, warmup, min_lr), expected, rel_tol=1e-9, abs_tol=1e-15)
        optimizer.step()
        schedule.step()


def test_the_ends_of_the_schedule():
    def lr(step):
        return warmup_cosine(step, 100, 1.0, 20, 0.1)

    assert math.isclose(lr(0), 1 / 21)  # not 0: a first step that does nothing is a step lost
    assert lr(19) == 20 / 21
    assert lr(20) == 1.0
    assert lr(21) < 1.0
    assert math.isclose(lr(60), 0.55)  # half of the way down in the middle ...
    assert math.isclose(lr(40), 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)  # ... on a cosine, not on a line
    assert lr(100) == lr(101) == lr(10**6) == 0.1
    assert all(lr(s) < lr(s + 1) for s in range(20))
    assert all(lr(s) > lr(s + 1) for s in range(20, 100))


def test_a_schedule_without_warmup_starts_at_its_top():
    assert warmup_cosine(0, 10, 0.3, 0) == 0.3
    assert warmup_cosine(10, 10, 0.3, 0) == 0.0


@pytest.mark.parametrize("warmup", [10, 25])
def test_a_warmup_as_long_as_the_run_or_longer_only_rises(warmup):
    rates = [warmup_cosine(s, 10, 1.0, warmup) for s in range(10)]
    np.testing.assert_allclose(rates, (np.arange(10) + 1) / (warmup + 1))


# --- one update over lists, that may be replaced --------------------------------------------------------------------


def test_a_step_is_one_call_of_the_update_over_lists(device):
    ours, _ = pairs(device)
    for i, p in enumerate(ours):
        p.grad = None if i == 1 else device.array(np.ones(p.shape))
    optimizer = AdamW([{"params": ours[:1], "lr": 0.5}, {"params": ours[1:]}], lr=0.1)
    calls = []
    with override(adamw, lambda *lists: calls.append(lists)) as mine:
        optimizer.step(0.25)
    assert mine.forward_calls == 1
    ((params, grads, exp_avgs, exp_avg_sqs, steps, lrs, decays, *rest),) = calls
    used = [p for i, p in enumerate(ours) if i != 1]
    assert all(a is p.data and g is p.grad for a, g, p in zip(params, grads, used, strict=True))
    assert [m.shape for m in exp_avgs] == [v.shape for v in exp_avg_sqs] == [p.shape for p in used]
    assert (steps, lrs, decays) == ([1] * len(used), [0.5, *[0.1] * (len(used) - 1)], [0.01] * len(used))
    assert rest == [(0.9, 0.999), 1e-8, 0.25]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_of_sgd_is_one_call_of_the_update_over_lists(device, momentum):
    ours, _ = pairs(device)
    for i, p in enumerate(ours):
        p.grad = None if i == 1 else device.array(np.ones(p.shape))
    optimizer = SGD([{"params": ours[:1], "lr": 0.5}, {"params": ours[1:]}], 0.1, momentum, 0.2, nesterov=momentum > 0)
    calls = []
    with override(sgd, lambda *lists: calls.append(lists)):
        optimizer.step(0.25)
    ((params, grads, buffers, *rest),) = calls
    used = [p for i, p in enumerate(ours) if i != 1]
    assert all(a is p.data and g is p.grad for a, g, p in zip(params, grads, used, strict=True))
    assert [getattr(b, "shape", None) for b in buffers] == [p.shape if momentum else None for p in used]
    assert rest == [[0.5, 0.1, 0.1], [0.2] * 3, momentum, momentum > 0, 0.25]
    assert optimizer.nbytes() == (sum(p.data.nbytes for p in used) if momentum else 0)


@each_optimizer
def test_an_update_that_fails_takes_no_step(device, make):
    optimizer = trained(make, device)
    function = adamw if isinstance(optimizer, AdamW) else sgd
    with pytest.raises(ZeroDivisionError), override(function, lambda *lists: 1 / 0):
        optimizer.step()
    assert steps_of(optimizer) == [3, 0, 3, 3]


def test_the_coefficient_multiplies_the_gradients(device):
    ours, others = pairs(device)[0], pairs(device)[0]
    a, b = AdamW(ours, weight_decay=0.1), AdamW(others, weight_decay=0.1)
    for i in range(3):
        for p, q in zip(ours, others, strict=True):
            g = normal(*p.shape, seed=i)
            p.grad, q.grad = device.array(g), device.array(g * 0.3)
        a.step(0.3)
        b.step()
    for p, q in zip(ours, others, strict=True):
        assert_close(p, host(q), rtol=1e-12)


@pytest.mark.parametrize("max_norm", [0.5, 1e3, math.inf])
def test_clip_leaves_the_coefficient_that_clipping_in_place_multiplies_with(device, max_norm):
    ours, _ = pairs(device)
    before = [normal(*p.shape, seed=i) for i, p in enumerate(ours)]
    for p, g in zip(ours, before, strict=True):
        p.grad = device.array(g.copy())
    norm, coefficient = clip(ours, max_norm)
    assert norm == pytest.approx(math.sqrt(sum((g**2).sum() for g in before)))
    for p, g in zip(ours, before, strict=True):
        assert_close(p.grad, g)
    assert clip_grad_norm_(ours, max_norm) == norm
    for p, g in zip(ours, before, strict=True):
        assert_close(p.grad, g * coefficient, rtol=1e-12)
    assert (coefficient == 1) == (max_norm > norm)


def test_a_parameter_in_fortran_order_keeps_its_memory():
    """So that a view of it, for example a tied weight, still sees its updates."""
    p = Parameter(np.asfortranarray(normal(4, 3)), np.float64)
    view = p.data.T
    optimizer = AdamW([p], lr=0.1)
    for _ in range(2):
        p.grad = normal(4, 3, seed=1)
        optimizer.step()
    np.testing.assert_array_equal(view, p.data.T)
    assert np.shares_memory(view, p.data)


def test_a_parameter_without_a_gradient_is_not_clipped(device):
    p, frozen = (Parameter(device.array(np.zeros(2, np.float32))) for _ in range(2))
    p.grad = device.array(np.float32([3, 4]))
    assert clip([p, frozen], 1.0)[0] == clip_grad_norm_([p, frozen], 10.0) == 5
    assert frozen.grad is None


@pytest.mark.parametrize("sign", [1, -1])
def test_a_norm_whose_square_overflows_is_that_of_the_largest_entry_whatever_its_sign(sign, device):
    p = Parameter(device.array(np.zeros(4, np.float32)))
    p.grad = device.array(np.full(4, sign * 1e25, np.float32))
    assert clip([p], 1.0)[0] == pytest.approx(2e25, rel=1e-5)


@pytest.mark.parametrize("wrong", [None, 1.0, [np.zeros(2)], [("name", Parameter([1.0]))], [None]], ids=str)
def test_clipping_what_are_no_parameters_is_refused(wrong):
    for function in (clip, clip_grad_norm_):
        with pytest.raises(TypeError, match=r"^clipping takes Parameters, such as model\.parameters\(\), not "):
            function(wrong, 1.0)
