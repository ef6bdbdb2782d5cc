"""What all optimizers share: groups of parameters and their options, state, checks. The formulas are in optim.py."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import count, groupby
from numbers import Real
from typing import Any

from .array import Array, array_module, is_array, to_device
from .tensor import Tensor


class Optimizer:
    """The base of the optimizers: groups of parameters with their options, and the state of each parameter.

    `params` is an iterable of Parameters, or of groups: dicts {"params": [...], "lr": ..., "weight_decay": ..., ...}
    whose options replace the defaults. A parameter may be any Tensor that is a leaf; one without a gradient is not
    updated. Raises TypeError for anything else; ValueError for no parameters, a parameter twice, an unknown option, and
    an option that is negative or not finite.

    A subclass names its `moments`, and calls one replaceable function on lists of arrays in its `update`.
    """

    moments: tuple[str, ...] = ()  # arrays of the parameter's shape, zeros at first, that an update reads and changes

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float, **options: Any):
        self._name = type(self).__name__
        self.defaults = self._checked({"lr": lr, "weight_decay": weight_decay, **options})
        given = self._listed(params)
        groups = given if given and isinstance(given[0], Mapping) else [{"params": given}]
        self.param_groups = [self._group(group) for group in groups]
        self.state: dict[Tensor, dict[str, Any]] = {}  # each parameter's, made at its first step
        if not self.parameters():
            raise ValueError(f"{self._name} got no parameters")
        if len(set(self.parameters())) < len(self.parameters()):
            raise ValueError(f"{self._name} got a parameter twice, and would update it twice a step")
        own = [group["lr"] for group in self.param_groups]
        self._lr_scales = [1.0 if x == lr else float(x / lr) if lr else math.inf for x in own]

    def update(self, lists: Sequence[Any], options: Mapping[str, Any], coefficient: Any) -> None:
        """Update parameters and moments in place, by one call of a replaceable function.

        `lists`, an item for each parameter: data, gradients, each of the `moments`, steps (from 1), lrs, weight_decays.
        `options` are the others, equal for all of them.
        """
        raise NotImplementedError(f"{self._name} has no update")

    def needs_moments(self, group: Mapping[str, Any]) -> bool:
        """Whether an update with the options of this group uses the moments."""
        return True

    def parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def zero_grad(self) -> None:
        for p in self.parameters():
            p.grad = None

    def set_lr(self, lr: float) -> None:
        """Set the learning rate. A group that was made with an lr of its own keeps its ratio to the optimizer's lr.

        PyTorch's schedulers do the same: they multiply each group's initial lr by one factor.
        """
        self._checked({"lr": lr})
        if math.inf in self._lr_scales:
            raise ValueError(f"{self._name}.set_lr: a group's own lr has no ratio to the optimizer's, which was 0")
        for group, scale in zip(self.param_groups, self._lr_scales, strict=True):
            group["lr"] = lr * scale

    def step(self, coefficient: Any = 1.0) -> None:
        """Update every parameter that has a gradient, multiplied by `coefficient` (a number, or on a GPU an array).

        One call of `update`; more only where groups differ in options other than lr and weight_decay.
        """
        for options, groups in groupby(self.param_groups, _shared):
            rows = [(p, group) for group in groups for p in group["params"] if p.grad is not None]
            if not rows:
                continue
            states = [self._state_of(p, group) for p, group in rows]
            lists = (
                [p.data for p, _ in rows],
                [p.grad for p, _ in rows],
                *([state.get(name) for state in states] for name in self.moments),
                [state["step"] + 1 for state in states],
                [group["lr"] for _, group in rows],
                [group["weight_decay"] for _, group in rows],
            )
            self.update(lists, options, coefficient)
            for state in states:  # after the update: if it fails, no step was taken
                state["step"] += 1

    def state_dict(self) -> dict[str, Any]:
        """{"state": {i: {"step": ..., moments}}, "param_groups": [{"params": [i, ...], options}]}, as PyTorch's.

        i is the index in `parameters()`. The state is the live one, not a copy.
        """
        index = count()
        return {
            "state": {i: self.state[p] for i, p in enumerate(self.parameters()) if p in self.state},
            "param_groups": [
                {**group, "params": [next(index) for _ in group["params"]]} for group in self.param_groups
            ],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy in the `state_dict()` of an optimizer of this class over parameters and groups like these.

        Raises ValueError that says what does not match; then nothing is loaded.
        """
        who = f"{self._name}.load_state_dict"
        if set(state_dict) != {"state", "param_groups"}:
            raise ValueError(f"{who}: the keys must be state and param_groups, not {', '.join(map(str, state_dict))}")
        groups, own = state_dict["param_groups"], self.state_dict()["param_groups"]
        if [(set(g), g.get("params")) for g in groups] != [(set(g), g["params"]) for g in own]:
            raise ValueError(f"{who}: the groups, or the names of their options, are not those of this optimizer")
        options = [self._checked({name: g[name] for name in self.defaults}) for g in groups]
        owners = [(p, new) for g, new in zip(self.param_groups, options, strict=True) for p in g["params"]]
        wrong, state = [], {}
        for i, entry in state_dict["state"].items():
            if i not in range(len(owners)):
                wrong.append(f"there is no parameter {i!r}")
                continue
            p, group = owners[i]
            moments = {name: x for name, x in entry.items() if name != "step"}
            shapes = {name: x.shape if is_array(x) else None for name, x in moments.items()}
            expected = dict.fromkeys(self.moments, p.shape)
            if shapes != expected and (shapes or self.needs_moments(group)):
                wrong.append(f"parameter {i} has {shapes}, not {expected}")
            elif not (isinstance(entry.get("step"), int) and entry["step"] >= 0):
                wrong.append(f"parameter {i} has the step {entry.get('step')!r}")
            else:
                state[p] = {"step": entry["step"], **{name: _copy(x, p) for name, x in moments.items()}}
        if wrong:
            raise ValueError(f"{who}: {'; '.join(wrong)}")
        self.state = state
        for group, new in zip(self.param_groups, options, strict=True):
            group.update(new)

    def nbytes(self) -> int:
        """Bytes of all moments."""
        return sum(x.nbytes for state in self.state.values() for x in state.values() if is_array(x))

    def _state_of(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        state = self.state.setdefault(p, {"step": 0})
        if self.needs_moments(group):
            for name in self.moments:
                if name not in state:
                    state[name] = array_module(p.data).zeros_like(p.data)
        return state

    def _group(self, group: Any) -> dict[str, Any]:
        """The group with all its options."""
        if not isinstance(group, Mapping) or "params" not in group:
            seen = f"one with the keys {list(group)}" if isinstance(group, Mapping) else type(group).__name__
            raise ValueError(f"{self._name}: a group is a dict with the key 'params', not {seen}")
        if unknown := [name for name in group if name not in ("params", *self.defaults)]:
            raise ValueError(f"{self._name}: a group has no option {unknown[0]!r}; it has {', '.join(self.defaults)}")
        params = self._listed(group["params"])
        for p in params:
            if not isinstance(p, Tensor):
                raise TypeError(f"{self._name} updates Parameters, not {type(p).__name__}")
            if p.op is not None:
                raise ValueError(f"{self._name} updates Parameters, not what {p.op.name()} made: it gets no gradient")
        options = {name: group.get(name, default) for name, default in self.defaults.items()}
        return {"params": params, **self._checked(options)}

    def _listed(self, params: Any) -> list[Any]:
        if isinstance(params, Tensor | Mapping) or not isinstance(params, Iterable):
            wanted = "a list of Parameters or of groups, such as [p] or model.parameters()"
            raise TypeError(f"{self._name} takes {wanted}, not one {type(params).__name__}")
        return list(params)

    def _checked(self, options: dict[str, Any]) -> dict[str, Any]:
        """`options`, if they make sense; betas as a tuple, which a JSON file does not have."""
        for name, x in options.items():
            if name == "betas":
                x = options[name] = tuple(x) if isinstance(x, list) else x
                if not (isinstance(x, tuple) and len(x) == 2 and all(_is_number(beta) and beta < 1 for beta in x)):
                    raise ValueError(f"{self._name}: betas must be two numbers, at least 0 and below 1, not {x!r}")
            elif not _is_number(x):
                raise ValueError(f"{self._name}: {name} must be a finite number and not negative, not {x!r}")
        return options


def _is_number(x: Any) -> bool:
    return isinstance(x, Real) and 0 <= float(x) < math.inf


def _shared(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options that one call of an update function takes for all parameters."""
    return {name: x for name, x in group.items() if name not in ("params", "lr", "weight_decay")}


def _copy(x: Array, p: Tensor) -> Array:
    """A copy of x with the dtype, the device and the memory layout of p."""
    copy = array_module(p.data).empty_like(p.data)
    copy[...] = to_device(x, p.device)
    return copy
