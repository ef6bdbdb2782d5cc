"""A run's folder: what is saved, what is refused, and that a resumed run is bit for bit equal to an unbroken one."""

import json
import os
import re
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
from safetensors.numpy import load_file

from tinylm import GPT, GPTConfig, files, random
from tinylm.data import CharTokenizer, fingerprint, split
from tinylm.runs import DamagedError, Run, load_model, metrics, newest_run, read_metrics
from tinylm.runs.checkpoint import _checksum
from tinylm.runs.progress import tell_changes
from tinylm.training import Step, TrainConfig, TrainState, train

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 12
VOCABULARY = CharTokenizer.of(TEXT)
TOKENS = VOCABULARY.encode(TEXT)
TRAIN, VAL = split(TOKENS, block_size=8)
DATA = fingerprint(TOKENS)
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
# Dropout on, a ragged accumulation (2 + 3), a schedule with a warmup, clipping at times.
CONFIG = {
    "steps": 20, "batch_size": 5, "accumulate": 2, "lr": 0.02, "min_lr": 0.001, "warmup": 3, "clip": 0.9,
    "eval_every": 6, "seed": 3,
}  # fmt: skip


def make(seed=3, vocabulary=VOCABULARY, sizes=None, **config):
    """A state before the first step."""
    random.seed(seed)
    sizes = {"block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 8, "dropout": 0.2, **(sizes or {})}
    return TrainState(GPT(GPTConfig(vocabulary.vocab_size, **sizes)), TrainConfig(**{**CONFIG, **config}))


def save(run, state, **options):
    return run.save(state, VOCABULARY, DATA, **options)


def resume(folder, state, vocabulary=VOCABULARY, data=DATA):
    """A Run after resuming `state` from its newest checkpoint, and its messages."""
    told = []
    run = Run(folder)
    run.resume(state, vocabulary, data, told.append)
    return run, told


def advance(run, state, steps=None, save_every=1, **options):
    """Train as the example does: record each step, save every `save_every`, at the best and at the end."""
    for done, step in enumerate(train(state, TRAIN, VAL), 1):
        run.record(step)
        best = step.val_loss is not None and step.val_loss == state.best_val_loss
        if best or state.finished or state.step % save_every == 0:
            save(run, state, **options)
        if done == steps:
            break


def new(folder, **config):
    run = Run(folder)
    run.start({})
    return run, make(**config)


def everything(state):
    """The whole state, with arrays as bytes."""
    whole = state.state_dict()
    del whole["random"], whole["training"], whole["optimizer"]["param_groups"]

    def plain(x):
        if isinstance(x, dict):
            return {key: plain(value) for key, value in x.items()}
        return x.tobytes() if isinstance(x, np.ndarray) else x

    return plain(whole)


def timeless(folder):
    """The lines of the metrics without the two measured times."""
    clock = ("tokens_per_second", "seconds")
    return [{name: v for name, v in line.items() if name not in clock} for line in read_metrics(folder)]


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def steps_saved(folder):
    return [checkpoint.step for checkpoint in Run(folder).checkpoints()]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A run with three checkpoints, of steps 1, 2 and 3; copied by the tests that change it."""
    folder = tmp_path_factory.mktemp("three")
    run, state = new(folder, eval_every=0)
    advance(run, state, steps=3, keep_last=3)
    return folder


@pytest.fixture
def saved(three, tmp_path):
    shutil.copytree(three, tmp_path / "run")
    return tmp_path / "run"


# --- bit for bit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "steps"), [(100, 200), (5, 12), (6, 12), (1, 12)])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(at, steps, tmp_path):
    run, whole = new(tmp_path / "whole", steps=steps)
    advance(run, whole, save_every=steps)

    run, part = new(tmp_path / "parts", steps=steps)
    advance(run, part, steps=at, save_every=at)
    random.seed(99, 7, 5)  # another process: other counters, and weights that were drawn from elsewhere
    again = make(seed=8, steps=steps)
    run, told = resume(tmp_path / "parts", again)
    assert told == [f"resumed after step {at} from {tmp_path / 'parts' / 'checkpoints' / f'step-{at:08}'}"]
    assert everything(again) == everything(part)
    advance(run, again, save_every=steps)

    assert everything(again) == everything(whole)
    assert timeless(tmp_path / "parts") == timeless(tmp_path / "whole")
    assert [line["step"] for line in read_metrics(tmp_path / "parts") if "loss" in line] == list(range(1, steps + 1))
    clipped = {line["clipped"] for line in read_metrics(tmp_path / "whole") if "loss" in line}
    assert steps < 100 or clipped == {False, True}
    ends = [load_file(tmp_path / name / "checkpoints" / f"step-{steps:08}" / FILES[1]) for name in ("whole", "parts")]
    assert all((ends[0][name] == ends[1][name]).all() for name in ends[0])


def test_the_random_counters_go_on_where_they_stood(tmp_path):
    run, state = new(tmp_path)
    random.seed(11, 22, 33)
    save(run, state)
    random.seed(0)
    resume(tmp_path, make())
    assert random.state() == (11, 22, 33)


def test_tokens_and_seconds_count_from_the_beginning(tmp_path):
    run, state = new(tmp_path)
    advance(run, state, steps=4)
    again, _ = resume(tmp_path, make())
    assert (again.log.tokens, again.log.seconds) == (4 * 5 * 8, pytest.approx(run.log.seconds))
    assert again.log.seconds > 0


def test_what_a_dead_process_did_after_its_checkpoint_is_forgotten(tmp_path):
    """Steps 5 to 7 were done and not saved; the last line and the last sample are incomplete."""
    run, state = new(tmp_path)
    run.record_sample(1, "early\n=== step 9999\r\n")
    advance(run, state, steps=7, save_every=4)
    run.record_sample(7, "late")
    samples, metrics = tmp_path / "samples.jsonl", tmp_path / "metrics.jsonl"
    before = metrics.read_text().splitlines()
    metrics.write_text(metrics.read_text() + '{"step": 8, "tok')
    state = make()
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000006")  # the best one
    resume(tmp_path, state)
    assert state.step == 4
    assert metrics.read_text().splitlines() == before[:4]
    assert samples.read_text() == '{"step": 1, "text": "early\\n=== step 9999\\r\\n"}\n'


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"[1, 2]\n", b'{"stop": 3}\n', b"{}\n", b"3\n"])
def test_a_damaged_line_of_metrics_is_passed_over(damage, saved):
    path = saved / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + damage + b"\n" + lines[1])
    _, told = resume(saved, make())
    assert len(told) == 1
    assert path.read_bytes() == lines[0] + lines[1]


# --- what a checkpoint is -----------------------------------------------------------------------------------------


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_checkpoint_is_safetensors_and_json_with_gpt_2s_names(tmp_path):
    run, state = new(tmp_path)
    advance(run, state, steps=6, save_every=6)
    path = tmp_path / "checkpoints" / "step-00000006"
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)

    weights = load_file(path / "model.safetensors")
    assert set(weights) == set(state.model.state_dict())
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.bias"} < set(weights)
    for name in ("ln_1.weight", "attn.c_attn.weight", "attn.c_proj.bias", "ln_2.bias", "mlp.c_fc.weight"):
        assert f"transformer.h.0.{name}" in weights
    for name, p in state.model.state_dict().items():
        assert weights[name].dtype == np.float32
        assert (weights[name] == p).all()
    moments = load_file(path / "optimizer.safetensors")
    assert set(moments) == {f"state.{i}.{kind}" for kind in ("exp_avg", "exp_avg_sq") for i in range(len(weights))}

    described = strict_json((path / "state.json").read_text())
    assert described["step"] == 6
    assert described["val_loss"] == described["best_val_loss"] == state.best_val_loss is not None
    assert [entry["step"] for entry in described["optimizer"]["state"].values()] == [6] * len(weights)
    assert described["model"]["class"] == "GPT"
    assert described["model"]["config"]["n_embd"] == 8
    assert described["training"]["lr"] == 0.02
    assert described["tokenizer"] == {"kind": "characters", "characters": VOCABULARY.characters}
    assert described["random"] == list(random.state())
    assert {"scaler", "evaluations_since_best", "data", "tokens", "seconds", "format"} < set(described)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        strict_json(line)
    assert not any(b"pickle" in content for content in contents(tmp_path).values())


def test_a_line_of_metrics_holds_what_the_step_did(tmp_path):
    run = Run(tmp_path)
    step = Step(3, 2.5, 1e-3, 0.5, True, 64, 0.25, val_loss=2.75, loss_scale=1024.0)
    lines = run.record(step)
    assert lines == list(read_metrics(tmp_path))
    assert lines == [
        {"step": 3, "tokens": 64, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.5, "clipped": True, "loss_scale": 1024.0,
         "tokens_per_second": 256.0, "seconds": 0.25},
        {"step": 3, "val_loss": 2.75},
    ]  # fmt: skip
    run.record(Step(4, 2.0, 1e-3, float("inf"), False, 64, 0.25))  # a float16 step that the scaler skipped
    assert [line["tokens"] for line in read_metrics(tmp_path) if "tokens" in line] == [64, 128]
    assert strict_json((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["grad_norm"] is None


def test_metrics_that_cannot_be_read_say_so(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*metrics.jsonl: No such file"):
        list(read_metrics(tmp_path))


def scored(run, *scores, **options):
    """Save a checkpoint for each validation loss (None: not evaluated)."""
    state = make()
    for step, score in enumerate(scores, 1):
        state.step, state.val_loss = step, score
        save(run, state, **options)
    return steps_saved(run.folder)


@pytest.mark.parametrize(
    ("keep_last", "scores", "left"),
    [
        (2, [None] * 5, [4, 5]),
        (3, [None] * 5, [3, 4, 5]),
        (1, [3.0, None, None], [1, 3]),  # the best stays, however old
        (2, [3.0, 2.0, 4.0, None, 2.5, None], [2, 5, 6]),
        (2, [3.0, 2.0, 4.0, None, 1.5, None], [5, 6]),  # an older best is a best no more
        (2, [3.0, 2.0, 2.0, None, None], [2, 4, 5]),  # of equals the first
        (0, [None, None], [2]),  # the newest stays, whatever is asked
    ],
)
def test_the_newest_and_the_best_are_kept(keep_last, scores, left, tmp_path):
    assert scored(Run(tmp_path), *scores, keep_last=keep_last) == left


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    folder = tmp_path / "checkpoints"
    for name in (
        "step-00000002",
        "step-123456789",
        "step-99999999",
        "step-12x",
        "step-",
        "other",
        ".step-00000001.7.tinylm",
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "state.json").touch()
    (folder / "step-00000003").write_text("a file")
    (folder / "step-00000004").mkdir()
    (folder / "step-00000004" / "notes.txt").write_text("somebody's")
    assert steps_saved(tmp_path) == [2, 99999999, 123456789]


def test_the_model_is_that_of_the_best_checkpoint_or_of_the_newest(tmp_path):
    run, state = new(tmp_path)
    for step, score in enumerate([None, 2.0, 3.0], 1):
        state.step, state.val_loss = step, score
        state.model.transformer.ln_f.bias.data[...] = step
        save(run, state, keep_last=3)

    def which():
        model, vocabulary = load_model(tmp_path)
        assert vocabulary.characters == VOCABULARY.characters
        assert not model.training
        return model.transformer.ln_f.bias.data[0]

    assert which() == 2
    (tmp_path / "checkpoints" / "step-00000002" / FILES[0]).write_bytes(b"damaged")
    assert which() == 3
    for step in (2, 3):
        (tmp_path / "checkpoints" / f"step-{step:08}" / FILES[2]).unlink()
    assert which() == 1
    (tmp_path / "checkpoints" / "step-00000001" / FILES[2]).unlink()
    with pytest.raises(ValueError, match=r"holds no sound checkpoint: .*state\.json cannot be read"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="holds no checkpoint of a run"):
        load_model(tmp_path / "elsewhere")


# --- another run --------------------------------------------------------------------------------------------------


OTHER_TEXT = TEXT.replace("q", "é")
CHANGES = {
    "width": ({"sizes": {"n_embd": 12}}, {}, "n_embd was 8 and is 12"),
    "two": ({"sizes": {"n_layer": 2, "block_size": 4}}, {}, "block_size was 8 and is 4; n_layer was 1 and is 2"),
    "heads": ({"sizes": {"n_head": 1}}, {}, "n_head was 2 and is 1"),  # fits the arrays, but computes something else
    "bias": ({"sizes": {"bias": False}}, {}, "bias was True and is False"),
    "vocabulary": (
        {}, {"vocabulary": CharTokenizer.of(OTHER_TEXT)}, "the vocabulary has changed (lost 'q', found 'é')"
    ),
    "order": ({}, {"vocabulary": CharTokenizer(VOCABULARY.characters[::-1])}, "the vocabulary has changed"),
    "data": ({}, {"data": fingerprint(TOKENS[::-1])}, "the data have changed"),
}  # fmt: skip


@pytest.mark.parametrize(("model", "rest", "message"), CHANGES.values(), ids=CHANGES)
def test_what_has_changed_is_named_and_nothing_is_touched(model, rest, message, saved):
    state = make(**model)
    before, files = everything(state), contents(saved)
    with pytest.raises(ValueError, match=f"^cannot resume: {re.escape(message)}$"):
        resume(saved, state, **rest)
    assert everything(state) == before
    assert contents(saved) == files


def test_without_a_checkpoint_a_run_begins_at_its_beginning(tmp_path):
    run, state = new(tmp_path)
    advance(run, state, steps=2, save_every=99)
    again = make()
    _, told = resume(tmp_path, again)
    assert again.step == 0
    assert re.fullmatch(r"there is no checkpoint in \S+checkpoints yet: beginning at the first step", *told)
    assert list(read_metrics(tmp_path)) == []


def test_a_new_run_takes_the_place_of_the_old_one(saved):
    run = Run(saved)
    assert run.exists()
    run.record_sample(1, "old")
    (saved / "notes.txt").write_text("not ours")
    with pytest.raises(ValueError, match="holds a run: resume"):
        run.start({"lr": 1})
    run.start({"lr": 1}, replace=True)
    assert run.config() == {"lr": 1}
    assert sorted(contents(saved)) == ["config.json", "notes.txt"]
    assert steps_saved(saved) == []


def test_checkpoints_without_a_configuration_are_a_run_too(saved):
    assert not Run(saved.parent).exists()
    assert not Run(saved / "metrics.jsonl").exists()
    (saved / "config.json").unlink()
    assert Run(saved).exists()
    with pytest.raises(ValueError, match=r"config\.json cannot be read: No such file or directory$"):
        Run(saved).config()


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON: .*line 1"), ("[1]", "is not the configuration of a run"), ("\udcff", "is not JSON: .*utf-8")],
)
def test_a_damaged_configuration_is_named(content, message, tmp_path):
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"config\.json {message}"):
        Run(tmp_path).config()


# --- damage -------------------------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(place):
    def damage(path):
        content = bytearray(path.read_bytes())
        content[int(place * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return damage


def of_another_run(path):
    run, state = new(path.parents[2].parent / "another", eval_every=0, lr=0.1)
    advance(run, state, steps=3, keep_last=3)
    shutil.copy(run.folder / "checkpoints" / path.parent.name / path.name, path)


def become_a_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "a folder": become_a_folder,
    "first byte": flip(0),
    "a bit at 0.3": flip(0.3),
    "a bit at 0.7": flip(0.7),
    "last byte": flip(1),
    "appended": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "foreign JSON": lambda path: path.write_text('{"step": 3, "sha256": {"state.json": "0"}}'),
    "a list": lambda path: path.write_text("[]"),
    "a deep list": lambda path: path.write_text("[" * 100_000),
    "a long number": lambda path: path.write_text("9" * 10_000),
    "binary": lambda path: path.write_bytes(bytes(range(256))),
    "of an older step": lambda path: shutil.copy(path.parents[1] / "step-00000002" / path.name, path),
    "of another run": of_another_run,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(name, damage, saved):
    if name == "state.json" and damage in (DAMAGES["appended"], DAMAGES["last byte"]):
        damage = flip(0.5)  # a blank after JSON is JSON
    path = saved / "checkpoints" / "step-00000003" / name
    damage(path)
    before = contents(saved)
    state = make()
    run, told = resume(saved, state)
    assert state.step == 2
    assert len(told) == 2
    if name == "state.json" and damage is DAMAGES["of another run"]:
        assert told[0] == f"1 of the checkpoints in {path.parents[1]} are of another run, and are left alone"
        left = {name: before[f"checkpoints/step-00000003/{name}"] for name in FILES}
        assert contents(path.parent) == left
        return
    assert told[0].startswith(f"{path.parent}/")
    if damage is DAMAGES["of an older step"] or damage is DAMAGES["of another run"]:
        assert "does not match its checksum" in told[0]
    else:
        assert told[0].startswith(f"{path} ")
    if damage in (DAMAGES["missing"], DAMAGES["a folder"]):
        assert re.search(r"cannot be read: (No such file|Is a directory)", told[0])
    assert told[0].endswith(": going back to an older checkpoint")
    assert "\n" not in told[0]
    assert told[1].startswith("resumed after step 2 from ")

    # Nothing is deleted: the damaged one stands aside and does not count among those to keep; step 3 is saved again.
    (aside,) = (saved / "checkpoints").glob("damaged-step-00000003.*")
    expected = {key.removeprefix("checkpoints/step-00000003/"): content for key, content in before.items()}
    assert contents(aside) == {name: content for name, content in expected.items() if name in FILES}
    assert steps_saved(saved) == [1, 2]
    advance(run, state, steps=1, keep_last=2)
    assert steps_saved(saved) == [2, 3]
    assert run.checkpoints()[-1].read()[0]["step"] == 3


def test_any_flipped_bit_of_the_weights_is_seen(saved):
    path = saved / "checkpoints" / "step-00000003"
    (checkpoint,) = (c for c in Run(saved).checkpoints() if c.step == 3)
    rng = random.generator(1)
    for name in FILES[:2]:
        good = (path / name).read_bytes()
        for at in rng.integers(len(good) * 8, size=40):
            bad = bytearray(good)
            bad[at // 8] ^= 1 << at % 8
            (path / name).write_bytes(bad)
            with pytest.raises(DamagedError, match=f"{name} does not match its checksum"):
                checkpoint.read()
        (path / name).write_bytes(good)
        checkpoint.read()


def test_any_flipped_bit_of_the_state_is_seen_or_means_nothing(saved):
    """JSON has several spellings of a value (1e-05 and 1E-05): a state that is accepted must equal the saved one."""
    (checkpoint,) = (c for c in Run(saved).checkpoints() if c.step == 3)
    path = checkpoint.path / "state.json"
    good, state = path.read_bytes(), checkpoint.about()
    refused = 0
    rng = random.generator(2)
    for at in rng.choice(len(good) * 8, size=600, replace=False):
        bad = bytearray(good)
        bad[at // 8] ^= 1 << at % 8
        path.write_bytes(bad)
        try:
            assert checkpoint.about() == state
        except DamagedError:
            refused += 1
    assert refused > 500


def test_a_later_format_is_refused(saved):
    path = saved / "checkpoints" / "step-00000003" / "state.json"
    described = json.loads(path.read_text())
    described["format"] += 1
    del described["sha256"]["state.json"]
    described["sha256"]["state.json"] = _checksum(described)
    path.write_text(json.dumps(described))
    _, told = resume(saved, make())
    assert "has format 4, and this tinylm reads (1, 2, 3)" in told[0]


def test_the_weights_of_an_earlier_format_load_but_its_run_does_not_resume(saved):
    path = saved / "checkpoints" / "step-00000003" / "state.json"
    described = json.loads(path.read_text())
    described["format"] = 1
    described["model"] = described["model"]["config"]
    described["vocabulary"] = described.pop("tokenizer")["characters"]
    del described["sha256"]["state.json"]
    described["sha256"]["state.json"] = _checksum(described)
    path.write_text(json.dumps(described))
    before = {file: file.read_bytes() for file in saved.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match="cannot resume: the run was saved by an earlier version of tinylm") as error:
        resume(saved, make())
    assert "\n" not in str(error.value)
    assert {file: file.read_bytes() for file in saved.rglob("*") if file.is_file()} == before
    loaded, _ = load_model(saved)
    weights = load_file(saved / "checkpoints" / "step-00000003" / "model.safetensors")
    for name, value in loaded.state_dict().items():
        np.testing.assert_array_equal(value, weights[name])


def test_where_all_is_damaged_it_says_so_and_deletes_nothing(saved):
    for checkpoint, name in zip(Run(saved).checkpoints(), FILES, strict=True):
        truncate(checkpoint.path / name)
    state = make()
    before, files = everything(state), contents(saved)
    told = []
    with pytest.raises(ValueError, match=r"^no checkpoint in \S+checkpoints is sound$"):
        Run(saved).resume(state, VOCABULARY, DATA, told.append)
    assert [line.partition("checkpoints/")[2][:13] for line in told] == [f"step-0000000{n}" for n in (3, 2, 1)]
    assert everything(state) == before
    assert contents(saved) == files


def test_what_a_killed_process_left_aside_is_swept(saved):
    aside = saved / "checkpoints" / ".step-00000003.99xy.tinylm"
    aside.mkdir()
    (aside / "model.safetensors").write_bytes(b"half")
    (saved / ".metrics.jsonl.99xy.tinylm").write_bytes(b"half")
    state = make()
    run, told = resume(saved, state)
    assert len(told) == 1
    save(run, state)
    assert [path.name for path in saved.rglob(".*")] == [".lock"]


# --- the disk -----------------------------------------------------------------------------------------------------


@contextmanager
def watched(monkeypatch, fail_at=None):
    """The calls to the disk in order, as (what, path); the one numbered `fail_at` raises instead, as on a full disk."""
    calls = []
    opened = {}

    def call(what, path):
        calls.append((what, os.path.basename(path)))
        if len(calls) - 1 == fail_at:
            raise OSError(28, "No space left on device", str(path))

    class File:
        def __init__(self, path, *args, **kwargs):
            path = opened.get(path, path)  # mkstemp opened it
            call("open", path)
            self.file, self.path = open(path, *args, **kwargs), path  # noqa: SIM115
            opened[self.file.fileno()] = path

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            self.file.write(content[: len(content) // 2])
            call("write", self.path)
            self.file.write(content[len(content) // 2 :])

        def __getattr__(self, name):
            return getattr(self.file, name)

    real = {name: getattr(os, name) for name in ("open", "fsync", "rename", "mkdir")}

    def os_open(path, *args, **kwargs):
        descriptor = real["open"](path, *args, **kwargs)
        opened[descriptor] = path
        return descriptor

    def wrap(what, path_of):
        return lambda *args, **kwargs: (call(what, path_of(args[0])), real[what](*args, **kwargs))[1]

    with monkeypatch.context() as patch:
        for module in (metrics, files):
            patch.setattr(module, "open", File, raising=False)
        patch.setattr(os, "open", os_open)
        patch.setattr(os, "fsync", wrap("fsync", opened.get))
        for what in ("rename", "mkdir"):
            patch.setattr(os, what, wrap(what, str))
        yield calls


def test_a_checkpoint_is_flushed_before_it_gets_its_name_and_its_name_after(saved, monkeypatch):
    state = make()
    run, _ = resume(saved, state)
    (step,) = [step for step, _ in zip(train(state, TRAIN, VAL), range(1), strict=False)]
    run.record(step)
    run.record_sample(4, "text")
    with watched(monkeypatch) as calls:
        save(run, state, keep_last=9)
    aside = f".step-{state.step:08}.*"
    assert [(what, re.sub(r"\.\w{8}\.tinylm$", ".*", name)) for what, name in calls] == [
        ("fsync", "metrics.jsonl"),
        ("fsync", "samples.jsonl"),
        ("mkdir", aside),
        *[(what, name) for name in FILES for what in ("open", "write", "fsync")],
        ("fsync", aside),
        ("rename", aside),
        ("fsync", "checkpoints"),
    ]


def test_metrics_and_configuration_are_replaced_whole_and_flushed(saved, monkeypatch):
    with watched(monkeypatch) as calls:
        Run(saved).write_config({"lr": 1})
    (what, aside), *rest = calls
    assert (what, aside.startswith(".config.json."), aside.endswith(".tinylm")) == ("open", True, True)
    assert rest == [("write", aside), ("fsync", aside), ("fsync", "run")]


CALLS = 15  # to the disk, by a save


@pytest.mark.parametrize("call", range(CALLS))
def test_a_full_disk_leaves_the_older_checkpoints_as_they_were(call, saved, monkeypatch):
    """Whichever call fails; and the next save, when the disk has room again, is sound."""
    state = make()
    run, _ = resume(saved, state)
    older = contents(saved / "checkpoints")
    train_on = train(state, TRAIN, VAL)
    next(train_on)
    with watched(monkeypatch, fail_at=call) as calls, pytest.raises(OSError, match="No space left"):
        save(run, state, keep_last=9)
    assert len(calls) == call + 1
    now = contents(saved / "checkpoints")
    assert {name: now.get(name) for name in older} == older
    if call < CALLS - 1:  # the last is the flush of the name
        assert now == older
    assert list((saved / "checkpoints").glob(".*")) == []

    next(train_on)
    save(run, state, keep_last=3)
    again = make()
    resume(saved, again)
    assert everything(again) == everything(state)


def test_a_save_makes_no_other_calls(saved, monkeypatch):
    state = make()
    run, _ = resume(saved, state)
    with watched(monkeypatch) as calls:
        state.step += 1
        save(run, state, keep_last=9)
    assert len(calls) == CALLS


def test_metrics_wait_for_a_disk_with_room(tmp_path, monkeypatch):
    """No line is incomplete, lost or repeated: half of a line is on the disk when the write fails."""
    run, state = new(tmp_path)
    steps = list(train(state, TRAIN, VAL))
    for i, step in enumerate(steps):
        if i % 3:
            with watched(monkeypatch, fail_at=1), pytest.raises(OSError, match="No space left"):
                run.record(step)
            with watched(monkeypatch, fail_at=1), pytest.raises(OSError, match="No space left"):
                run.record_sample(step.step, "a text")
        else:
            run.record(step)
            run.record_sample(step.step, "a text")
        assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")
    run.record(Step(21, 1.0, 1.0, 1.0, False, 1, 1.0))
    assert [line["step"] for line in read_metrics(tmp_path) if "loss" in line] == list(range(1, 22))
    run.log.sync()
    assert (tmp_path / "samples.jsonl").read_text() == "".join(
        f'{{"step": {n}, "text": "a text"}}\n' for n in range(1, 21)
    )


# --- a model that is no longer finite -----------------------------------------------------------------------------


def weight(value):
    def spoil(state):
        state.model.transformer.h[0].mlp.c_fc.weight.data[1, 2] = value

    return spoil


def moment(state):
    state.optimizer.state_dict()["state"][3]["exp_avg_sq"][...] = np.inf


BAD = {
    "a weight is NaN": (weight(np.nan), r"transformer\.h\.0\.mlp\.c_fc\.weight is not finite"),
    "a weight is infinite": (weight(-np.inf), r"transformer\.h\.0\.mlp\.c_fc\.weight is not finite"),
    "a moment is infinite": (moment, r"state\.3\.exp_avg_sq is not finite"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD)
def test_a_bad_state_takes_the_place_of_no_good_one(spoil, message, saved):
    state = make()
    run, _ = resume(saved, state)
    before = contents(saved)
    next(train(state, TRAIN, VAL))
    spoil(state)
    good = re.escape(str(saved / "checkpoints" / "step-00000003"))
    with (
        pytest.raises(FloatingPointError, match=rf"^step 4: .*; {message}.*; the last good checkpoint is {good}$"),
        run.keeping(state, lambda: save(run, state)),
    ):
        save(run, state, keep_last=1)
    # The checkpoints are as they were; the metrics say what happened.
    metrics = list(read_metrics(saved))
    assert metrics.pop() == {"step": state.step + 1, "loss": None, "grad_norm": None}
    (saved / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    assert contents(saved) == before
    assert state.model.training


def test_saving_changes_nothing_in_the_run(tmp_path):
    run, state = new(tmp_path)
    next(train(state, TRAIN, VAL))
    random.seed(5, 6, 7)
    before = everything(state), random.state()
    gradients = [p.grad for p in state.model.parameters()]
    save(run, state)
    assert (everything(state), random.state()) == before
    assert all(p.grad is g for p, g in zip(state.model.parameters(), gradients, strict=True))


def test_without_a_checkpoint_a_bad_run_says_there_is_none(tmp_path):
    with (
        pytest.raises(FloatingPointError, match=r"^the loss; there is no checkpoint yet$"),
        Run(tmp_path).keeping(TrainState(make().model, TrainConfig()), lambda: None),
    ):
        raise FloatingPointError("the loss")


# --- stopping early -----------------------------------------------------------------------------------------------


def test_patience_survives_a_resume(tmp_path, monkeypatch):
    """The second and later evaluations are worse: patience 3 ends the run at the fourth, resumed or not."""
    scores = {2: 2.0, 4: 2.5, 6: 2.5, 8: 2.5}

    def run_until(state, run, last=None):
        monkeypatch.setattr("tinylm.training.evaluate", lambda *_: scores[state.step])
        advance(run, state, steps=last)
        return state

    settings = {"eval_every": 2, "early_stop": 3}
    run, state = new(tmp_path / "whole", **settings)
    whole = run_until(state, run)
    assert (whole.step, whole.evaluations_since_best, whole.best_val_loss) == (8, 3, 2.0)
    run, state = new(tmp_path / "parts", **settings)
    run_until(state, run, 5)
    again = make(**settings)
    run, _ = resume(tmp_path / "parts", again)
    assert everything(run_until(again, run)) == everything(whole)
    assert timeless(tmp_path / "parts") == timeless(tmp_path / "whole")

    ended = make(**settings)
    run, _ = resume(tmp_path / "parts", ended)
    assert ended.finished
    assert list(train(ended, TRAIN, VAL)) == []  # resumed again, it does not take one more step


# --- what a resumed run says of its changes -----------------------------------------------------------------------


def told_changes(capsys, step, **changes):
    before = {"steps": 20, "lr": 0.02, "warmup": 3, "min_lr": 0.0, "device": "cpu"}
    tell_changes(before, {**before, **changes}, step)
    return capsys.readouterr().out.splitlines()


def test_nothing_is_said_of_nothing(capsys):
    assert told_changes(capsys, 10) == []


def test_another_learning_rate_is_noted(capsys):
    assert told_changes(capsys, 10, lr=0.01, new=3) == ["note: lr was 0.02 and is 0.01 from here on"]


def test_more_steps_stretch_the_cosine(capsys):
    (line,) = told_changes(capsys, 10, steps=37)
    assert line == (
        "note: the run was to end after 20 steps and now ends after 37; the cosine is stretched to it, "
        "and the learning rate goes on at 1.80e-02 instead of 1.27e-02"
    )
    assert "goes on at 1.13e-02 instead of 0.00e+00" in told_changes(capsys, 20, steps=40)[0]


def test_a_run_that_has_had_its_steps_says_so(capsys):
    line = "note: the run has had its {} steps; give more --steps to go on"
    assert told_changes(capsys, 20) == [line.format(20)]
    assert told_changes(capsys, 20, steps=15) == [line.format(15)]


# --- what a user of the library may do ----------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["id", "format", "version"])
def test_a_config_does_not_take_the_runs_own_keys(key, tmp_path):
    with pytest.raises(ValueError, match=rf"^a run's config cannot have the keys {key}: tinylm uses them$"):
        Run(tmp_path / "new").start({key: "mine"})
    assert not (tmp_path / "new").exists()


def test_a_run_that_was_neither_started_nor_resumed_here_goes_on_as_itself(saved):
    state = make()
    state.step = 4
    save(Run(saved), state, keep_last=9)
    assert steps_saved(saved) == [1, 2, 3, 4]
    assert run_id(saved, 4) == run_id(saved, 3)


def run_id(folder, step):
    return json.loads((folder / "checkpoints" / f"step-{step:08}" / "state.json").read_text())["run"]


def test_a_second_start_counts_from_zero(tmp_path):
    run, state = new(tmp_path)
    advance(run, state, steps=3)
    run.start({}, replace=True)
    assert (run.log.tokens, run.log.seconds) == (0, 0)


def test_a_replaced_runs_damaged_checkpoint_does_not_block_the_new_run(saved):
    for checkpoint in Run(saved).checkpoints():
        truncate(checkpoint.path / "state.json")
    Run(saved).start({}, replace=True)
    _, told = resume(saved, make())
    assert [line.partition(" in ")[0] for line in told] == ["there is no checkpoint"]


def test_a_failure_does_not_set_aside_the_checkpoint_that_was_resumed_from(saved):
    """The cause may be a mistake in the user's op, since mended."""
    state = make()
    run, _ = resume(saved, state)
    good = r"the last good checkpoint is .*step-00000003"
    with pytest.raises(FloatingPointError, match=good), run.keeping(state, lambda: save(run, state)):
        raise FloatingPointError("step 4: the loss is nan")
    assert steps_saved(saved) == [1, 2, 3]


def test_where_only_a_bad_checkpoint_is_left_the_logs_are_kept(tmp_path):
    run, state = new(tmp_path)
    advance(run, state, steps=2, save_every=2)
    none = "there is no checkpoint yet"
    with pytest.raises(FloatingPointError, match=none), run.keeping(state, lambda: save(run, state)):
        raise FloatingPointError("step 3: the loss is nan")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"set aside as .*bad-step-00000002.*: rename it to step-\.\.\. to go on"):
        resume(tmp_path, make())
    assert contents(tmp_path) == before


def test_a_validation_loss_that_is_not_finite_is_recorded_as_such(tmp_path, monkeypatch):
    run, state = new(tmp_path)
    monkeypatch.setattr("tinylm.training.evaluate", lambda *_: float("nan"))
    told = "step 6: the validation loss is nan"
    with pytest.raises(FloatingPointError, match=told), run.keeping(state, lambda: save(run, state)):
        advance(run, state, save_every=99)
    *_, step, evaluation = read_metrics(tmp_path)
    assert (step["step"], evaluation) == (6, {"step": 6, "val_loss": None})
    assert step["loss"] > 0


def test_the_newest_run(tmp_path):
    assert newest_run(tmp_path) is None
    for time, name in enumerate(["novel-2", "novel", "char"]):
        Run(tmp_path / name).start()
        os.utime(tmp_path / name / "config.json", (time, time))
    assert newest_run(tmp_path) == tmp_path / "char"
    assert newest_run(tmp_path, r"novel(-\d+)?") == tmp_path / "novel"


def test_a_run_whose_configuration_is_damaged_still_gives_its_model(saved):
    (saved / "config.json").write_text("{")
    assert load_model(saved)[1].describe() == VOCABULARY.describe()
    assert steps_saved(saved) == [1, 2, 3]
