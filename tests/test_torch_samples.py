"""PyTorch's own sample inputs (its OpInfo database), run through every op that PyTorch has too: values and gradients.

`TABLE` says with which of PyTorch's ops an op of tinylm is compared, and how PyTorch's arguments are translated. A
sample is skipped only for a reason that `refusal` gives, and each row says how many must remain. Two more samples are
derived from a sample: with NaN and infinities in its first tensor, and in the cotangents.
"""

import functools
import inspect
import math
import operator
import sys
import types
import unittest
from collections import Counter

import hypothesis
import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from tinylm import Tensor, autograd, ops

DTYPES = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
LARGE = 20_000  # elements; larger samples test nothing that smaller ones do not
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
NAMES = {"dim": "axis", "keepdim": "keepdims", "correction": "ddof"}  # PyTorch's word: tinylm's
# Arguments that change nothing at this value (... is any value), and so may be left out of a call.
NEUTRAL = {"alpha": 1, "keepdim": False, "dropout_p": 0.0, "attn_mask": None, "memory_format": ...}


def is_float(x):
    return isinstance(x, torch.Tensor) and x.dtype.is_floating_point


def to(x, *args):
    """x.to(dtype) or x.to(device, dtype), then non_blocking and copy."""
    return x.to(next(a for a in args if isinstance(a, np.dtype)))


def var(x, axis=None, unbiased=True, ddof=1, keepdims=False, op=ops.var):
    """PyTorch's None is 1."""
    return op(x, axis, keepdims, (1 if ddof is None else ddof) if unbiased else 0)


std = functools.partial(var, op=ops.std)


def select(x, axis, i):
    return x[(*[slice(None)] * (axis % x.ndim), i)]


def layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
    """Over the last axis, into which the axes of `shape` are flattened."""
    weight = Tensor(np.ones(shape, x.dtype)) if weight is None else weight
    bias = None if bias is None else bias.reshape(-1)
    flat = x.reshape(*x.shape[: x.ndim - len(shape)], math.prod(shape))
    return ops.layer_norm(flat, weight.reshape(-1), bias, eps).reshape(x.shape)


def attention(q, k, v, is_causal):
    """PyTorch's query i sees the keys up to i, tinylm's last query the last key: the same without the later keys."""
    k, v = (x[..., : q.shape[-2], :] for x in (k, v))
    if q.ndim == 4:
        return ops.causal_attention(q, k, v)
    return ops.causal_attention(*(x.expand_dims(0) for x in (q, k, v))).squeeze(0)


def cross_entropy(x, target, ignore_index=-100, reduction="mean"):
    """With the classes on the last axis; PyTorch has them on the second."""
    return ops.cross_entropy(x.permute(0, *range(2, x.ndim), 1), target, ignore_index, reduction)


def linear_cross_entropy(x, w, target, ignore_index=-100, reduction="mean"):
    return ops.linear_cross_entropy(x, w, target, ignore_index, reduction)


# tinylm's op; PyTorch's, as "name" or "name/variant" of an OpInfo; the call, which takes PyTorch's arguments under the
# NAMES (what it has no parameter for is not offered); how many samples must be compared, over all dtypes.
TABLE = [
    ("add", "add", ops.add, 1200),
    ("sub", "sub", ops.sub, 1100),
    ("sub", "rsub", lambda x, y: y - x, 1100),
    ("mul", "mul", ops.mul, 1200),
    ("div", "div/no_rounding_mode", ops.div, 1200),
    ("div", "__rdiv__", lambda x, y: y / x, 1200),
    ("maximum", "maximum", ops.maximum, 1000),
    ("pow", "pow", ops.pow, 1000),
    ("pow", "square", lambda x: x**2, 390),
    ("pow", "reciprocal", lambda x: x**-1.0, 390),
    ("neg", "neg", ops.neg, 310),
    ("exp", "exp", ops.exp, 390),
    ("log", "log", ops.log, 390),
    ("sqrt", "sqrt", ops.sqrt, 350),
    ("tanh", "tanh", ops.tanh, 350),
    ("sigmoid", "sigmoid", ops.sigmoid, 350),
    ("sin", "sin", ops.sin, 350),
    ("cos", "cos", ops.cos, 350),
    ("abs", "abs", ops.abs, 310),
    ("clamp", "clamp", ops.clamp, 270),
    ("clamp", "clamp_min", lambda x, low: ops.clamp(x, low), 900),
    ("clamp", "clamp_max", lambda x, high: ops.clamp(x, max=high), 900),
    ("masked_fill", "masked_fill", ops.masked_fill, 190),
    ("tril", "tril", ops.tril, 190),
    ("relu", "nn.functional.relu", ops.relu, 380),
    ("gelu", "nn.functional.gelu", lambda x, approximate: ops.gelu(x), 24),
    ("where", "where", lambda a, condition, b: ops.where(condition, a, b), 300),
    *((name, name, getattr(operator, name), 1000) for name in COMPARISONS),
    ("clone", "clone", ops.clone, 760),
    ("cast", "to", to, 180),
    ("cast", "half", lambda x: x.half(), 440),
    ("sum", "sum", ops.sum, 460),
    ("mean", "mean", ops.mean, 340),
    ("max", "amax", ops.max, 460),
    ("min", "amin", ops.min, 460),
    ("var", "var", var, 290),
    ("std", "std", std, 290),
    ("std", "std/unbiased", lambda x, unbiased: x.std(ddof=int(unbiased)), 69),
    ("var", "var/unbiased", lambda x, unbiased: x.var(ddof=int(unbiased)), 69),
    ("argmax", "argmax", lambda x, axis=None: x.argmax(axis), 150),
    ("logsumexp", "logsumexp", ops.logsumexp, 320),
    ("softmax", "softmax", ops.softmax, 100),
    ("log_softmax", "log_softmax", ops.log_softmax, 100),
    ("reshape", "reshape", ops.reshape, 450),
    ("flatten", "ravel", lambda x: x.flatten(), 34),
    ("permute", "permute", lambda x, axes: ops.permute(x, axes), 740),
    ("transpose", "permute", lambda x, axes: x.transpose(axes), 740),
    ("transpose", "transpose", lambda x, i, j: x.transpose(i, j), 84),
    ("transpose", "t", lambda x: x.T, 34),
    ("swapaxes", "transpose", ops.swapaxes, 84),
    ("squeeze", "squeeze", ops.squeeze, 60),
    ("squeeze", "squeeze/multiple", ops.squeeze, 46),
    ("expand_dims", "unsqueeze", ops.expand_dims, 100),
    ("broadcast_to", "broadcast_to", ops.broadcast_to, 81),
    ("cat", "cat", ops.cat, 110),
    ("stack", "stack", ops.stack, 100),
    ("split", "split", ops.split, 24),
    ("split", "split_with_sizes", lambda x, sizes, axis=0: x.split(sizes, axis), 46),
    ("chunk", "chunk", lambda x, n, axis=0: ops.chunk(x, n, axis), 180),
    ("index", "__getitem__", ops.index, 180),
    ("index", "select", select, 69),
    ("index", "index_select", select, 24),
    ("matmul", "matmul", ops.matmul, 330),
    ("linear", "nn.functional.linear", ops.linear, 400),
    ("embedding", "nn.functional.embedding", ops.embedding, 18),
    ("layer_norm", "nn.functional.layer_norm", layer_norm, 100),
    ("causal_attention", "nn.functional.scaled_dot_product_attention", attention, 12),
    ("cross_entropy", "nn.functional.cross_entropy", cross_entropy, 120),
    ("linear_cross_entropy", "nn.functional.linear_cross_entropy", linear_cross_entropy, 140),
]
NOT_COMPARED = {"dropout"}  # PyTorch draws other numbers
# These ops see their samples again with NaN and infinities sprinkled in; those of element-wise ops have them already.
SPECIAL = ([np.nan], [np.inf], [-np.inf], [np.nan, np.inf, -np.inf])
SPRINKLED = {"where", "masked_fill", "tril", "sum", "mean", "max", "min", "var", "std", "argmax", "logsumexp"}
SPRINKLED |= {"softmax", "log_softmax", "matmul", "linear"}
SPRINKLED |= {"layer_norm", "cross_entropy", "linear_cross_entropy"}
# The ops whose cotangents stay finite: they have none, or form their products in another order than PyTorch.
TAME = {*COMPARISONS, "argmax", "causal_attention", "linear_cross_entropy"}
LOSSES = {"cross_entropy", "linear_cross_entropy"}  # float32 for float16, where PyTorch's are float16
# Rounding errors grow where a row has a variance of 0 (by 1/sqrt(eps)), and with scores of some hundreds.
ULPS = {"layer_norm": 4000, "causal_attention": 256}


@functools.cache
def infos():
    """PyTorch's OpInfos by "name" or "name/variant"."""
    try:
        import expecttest  # noqa: F401
    except ImportError:  # PyTorch's tests derive a class from it, which nobody needs here
        sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)
    from torch.testing._internal.common_methods_invocations import op_db

    hypothesis.settings.load_profile("tinylm")  # that import has loaded a profile of its own
    return {"/".join(filter(None, (info.name, info.variant_test_name))): info for info in op_db}


def sprinkled(x, values):
    """`x` with one of the `values` in about half of its places."""
    special = torch.tensor(values, dtype=x.dtype)[torch.randint(len(values), x.shape)]
    return torch.where(torch.rand(x.shape) < 0.5, special, x)


def samples(op, info, dtype):
    """(arguments, keywords, whether cotangents are to be sprinkled) of each sample, then of those derived from it."""
    draw = info.reference_inputs_func or info.sample_inputs_func
    for sample in list(draw(info, "cpu", dtype, requires_grad=False)):
        x, args, kwargs = sample.input, sample.args, sample.kwargs
        kwargs = {k: v for k, v in kwargs.items() if k not in NEUTRAL or NEUTRAL[k] not in (v, ...)}
        if info.name == "pow" and isinstance(args[0], torch.Tensor) and args[0].numel():
            args = (args[0].flatten()[0].item(),)  # tinylm's exponents are numbers
        if info.name.startswith("clamp"):  # and so are its limits
            args = tuple(x.flatten()[0].item() if isinstance(x, torch.Tensor) and x.numel() else x for x in args)
        if "ignore_index" in kwargs:
            kwargs["ignore_index"] = args[-1].flatten()[0].item()  # one that does occur
        yield [x, *args], kwargs, False
        if dtype.is_floating_point and op not in TAME:
            yield [x, *args], kwargs, True
        for values in SPECIAL if op in SPRINKLED and is_float(x) else ():
            yield [sprinkled(x, values), *args], kwargs, False


def refusal(info, offered, args, kwargs):
    """Why tinylm cannot be given this sample; None where it can. `offered`: the parameters of tinylm's call."""
    leaves = tree_leaves((args, kwargs))
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    if not tensors:
        return "no tensor"
    if any(x.numel() > LARGE for x in tensors):
        return "large"
    if any(isinstance(x, complex) for x in leaves):
        return "a complex number"
    for name in kwargs:
        if NAMES.get(name, name) not in offered:
            return f"{name}="
    match info.name, *args:
        case "pow", _, torch.Tensor():
            return "a tensor as exponent"
        case (("clamp" | "clamp_min" | "clamp_max"), _, *limits) if any(isinstance(x, torch.Tensor) for x in limits):
            return "an empty tensor as limit"
        case (("clamp" | "clamp_min" | "clamp_max"), x, *_) if x.dtype == torch.bool:
            return "a boolean, which PyTorch limits by a tensor only"
        case "clamp", x, *limits if x.dtype == torch.uint8 and any(n is not None and n < 0 for n in limits):
            return "a limit below 0, which PyTorch wraps around"
        case "pow", x, n if n < 0 and not is_float(x):
            return "an integer to a negative power"
        case "nn.functional.gelu", _ if kwargs["approximate"] == "none":
            return "GELU by the error function"
        case "to", _, torch.Tensor(), *_:
            return "to another tensor"
        case (("softmax" | "log_softmax" | "transpose" | "squeeze"), x, *_) if x.ndim == 0:
            return "an axis of a number is an error"
        case "squeeze", x, axes if any(x.shape[i] > 1 for i in np.atleast_1d(axes).astype(int)):
            return "to squeeze an axis longer than 1 is an error"
        case "cat", xs, *_ if len({x.ndim for x in xs}) > 1:
            return "empty vectors beside other ranks"
        case "index_select", x, *_ if x.ndim == 0:
            return "an index into a number"
        case "nn.functional.scaled_dot_product_attention", q, k, _ if not kwargs["is_causal"] or q.ndim != k.ndim:
            return "attention that is not causal, or heads that broadcast"
        case (("nn.functional.cross_entropy" | "nn.functional.linear_cross_entropy"), *_, target) if is_float(target):
            return "targets that are probabilities"
        case _, *_, target if "ignore_index" in kwargs and bool((target == kwargs["ignore_index"]).all()):
            return "no target that counts: the loss is 0, PyTorch's NaN"
        case "nn.functional.linear_cross_entropy", _, w, _ if w.ndim > 2 or kwargs.get("reduction") == "none":
            return "weights of more axes, or a loss for each row"
    return None


def ours(x):
    """PyTorch's `x` converted for tinylm; a tensor keeps its memory and strides."""
    if isinstance(x, torch.Tensor):
        return Tensor(x.detach().numpy(), requires_grad=x.requires_grad)
    return np.dtype(str(x).removeprefix("torch.")) if isinstance(x, torch.dtype) else x


def theirs(info, args, kwargs, leaves, wild, dys=None):
    """PyTorch's results, their cotangents (random ones unless given) and the gradients of the `leaves`."""
    ys = info.op(*args, **kwargs)
    ys = tuple(ys) if isinstance(ys, tuple | list) else (ys,)
    if not ys[0].requires_grad:
        return ys, (), ()
    dys = dys or [sprinkled(dy, SPECIAL[-1]) if wild else dy for dy in (torch.randn(y.shape) for y in ys)]
    dys = [dy.to(y.dtype) for dy, y in zip(dys, ys, strict=True)]
    return ys, dys, torch.autograd.grad(ys, leaves, dys, materialize_grads=True)


def compare(op, info, call, args, kwargs, wild):
    """Run both on one sample; compare dtypes, values and the gradients under a random cotangent."""
    args, kwargs = tree_map(lambda x: x.detach().requires_grad_() if is_float(x) else x, (args, kwargs))
    leaves = [x for x in tree_leaves((args, kwargs)) if is_float(x)]
    wanted, dys, grads = theirs(info, args, kwargs, leaves, wild)
    others = grads
    if dys and torch.float16 in {x.dtype for x in leaves}:
        # PyTorch rounds, and overflows, between the steps of a backward; an op of tinylm, which computes in float32,
        # at its end. Either will do.
        wide = tree_map(lambda x: x.float() if is_float(x) and x.dtype == torch.float16 else x, (args, kwargs))
        others = theirs(info, *wide, leaves, wild, dys)[2]

    args_, kwargs_ = tree_map(ours, (args, kwargs))
    leaves_ = [x for x in tree_leaves((args_, kwargs_)) if isinstance(x, Tensor) and x.requires_grad]
    with np.errstate(all="ignore"):
        ys = call(*args_, **{NAMES.get(name, name): x for name, x in kwargs_.items()})
        ys = ys if isinstance(ys, tuple) else (ys,)
        if dys:
            autograd.backward(ys, [dy.numpy().astype(y.dtype) for dy, y in zip(dys, ys, strict=True)])

    elementwise = type(info).__name__ in ("UnaryUfuncInfo", "BinaryUfuncInfo")
    for y, want in zip(ys, wanted, strict=True):
        dtype = str(want.dtype).removeprefix("torch.")
        assert y.dtype == ("float32" if op in LOSSES and dtype == "float16" else dtype)
        assert y.requires_grad == want.requires_grad
        assert_close(y.data, want, want, None if elementwise else op, "value")
    for i, (x, grad, other) in enumerate(zip(leaves_, grads, others, strict=True) if dys else ()):
        dx = np.zeros(x.shape, x.dtype) if x.grad is None else x.grad
        assert dx.dtype == x.dtype
        assert_close(dx, grad, other, None if elementwise and x.shape == ys[0].shape else op, f"gradient {i}")


def assert_close(got, want, other, sums, what):
    """Equal shapes, and each value (the non-finite ones too) that of `want` or `other` but for some rounding errors.

    `sums` is the op if its results are sums, which may cancel: then the largest of them is the measure for all.
    """
    want, other = want.detach().numpy(), other.detach().numpy()
    assert got.shape == want.shape, f"{what}: shape {got.shape}, PyTorch's {want.shape}"
    if np.array_equal(got, want, equal_nan=want.dtype.kind == "f"):
        return
    assert want.dtype.kind == "f", f"{what}: {got}, PyTorch's {want}"
    half = want.dtype == np.float16
    rtol = np.finfo(want.dtype).eps * ((32 if half else ULPS.get(sums, 32)) if sums else (2 if half else 8))
    got, want, other = (x.astype(np.float64) for x in (got, want, other))
    atol = rtol * (np.abs(want[np.isfinite(want)]).max(initial=1.0) if sums else 1.0)
    want = np.where(np.isclose(got, other, rtol, atol), other, want)
    np.testing.assert_allclose(got, want, rtol, atol, err_msg=what)


@pytest.fixture(autouse=True)
def _one_thread():
    """On samples this small PyTorch's threads wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("op", "name", "call", "least"), TABLE, ids=[f"{op}-{name}" for op, name, *_ in TABLE])
def test_samples(op, name, call, least):
    info, offered = infos()[name], inspect.signature(call).parameters
    compared, refused, failures = 0, Counter(), []
    torch.manual_seed(0)
    for dtype in (dtype for name in DTYPES if (dtype := getattr(torch, name)) in info.dtypes):
        for args, kwargs, wild in samples(op, info, dtype):
            if reason := refusal(info, offered, args, kwargs):
                refused[reason] += 1
                continue
            compared += 1
            try:
                compare(op, info, call, args, kwargs, wild)
            except Exception as error:
                shapes = tree_map(lambda x: f"{x.dtype}{[*x.shape]}" if hasattr(x, "shape") else x, (args, kwargs))
                failures.append(f"{shapes}: {type(error).__name__} {error}")
    assert not failures, f"{len(failures)} of {compared} samples:\n" + "\n".join(failures[:20])
    assert compared >= least, f"only {compared} samples compared; refused: {dict(refused)}"


def test_every_op_is_compared():
    names = {name for name, f in vars(ops).items() if inspect.isfunction(f)}
    assert not names - {op for op, *_ in TABLE} - NOT_COMPARED
