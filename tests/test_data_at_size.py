"""Text larger than memory: prepared in pieces, checked when opened, memory-mapped for training."""

import errno
import functools
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm import GPT, GPTConfig
from tinylm.data import CharTokenizer, Tokens, fingerprint, get_batch, open_tokens, read_chunks, read_text, split
from tinylm.data import prepare as preparing
from tinylm.data import tokens as token_files
from tinylm.data.prepare import main, prepare
from tinylm.data.tokens import HEADER, TOKENS
from tinylm.training import evaluate

TEXT = "".join(f"{n} — die {n}. Zeile, η γραμμή, 第{n}行, 🙂\n" for n in range(300))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of a few bytes and tokens, so that a short text has many borders."""
    monkeypatch.setattr(preparing, "read_chunks", functools.partial(read_chunks, size=5))
    monkeypatch.setattr(token_files, "CHUNK", 7)


@pytest.fixture
def prepared(tmp_path):
    prepare([write(tmp_path / "text", TEXT)], tmp_path / "prepared")
    return tmp_path / "prepared"


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- reading in pieces --------------------------------------------------------------------------------------------


@given(st.text(CHARACTERS, min_size=1), st.integers(3, 9), st.booleans())
def test_the_pieces_of_a_text_are_the_text(tmp_path, text, size, mark):
    path = write(tmp_path / "text", ("\ufeff" if mark else "") + text.removeprefix("\ufeff") + ".")
    pieces = list(read_chunks(path, size))
    assert "".join(text for text, _ in pieces) == text.removeprefix("\ufeff") + "."
    assert sum(size for _, size in pieces) == path.stat().st_size
    assert max(size for _, size in pieces) <= size


@given(st.text(CHARACTERS, max_size=9), st.binary(max_size=5), st.text(CHARACTERS, max_size=9), st.integers(3, 9))
def test_what_is_not_utf_8_is_found_where_it_is(tmp_path, before, middle, after, size):
    raw = before.encode() + middle.replace(b"\0", b"\xff") + after.encode()
    path = write(tmp_path / "text", raw)
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        with pytest.raises(ValueError, match="not UTF-8") as caught:
            list(read_chunks(path, size))
        at = error.start
        assert str(caught.value) == f"{path} is not UTF-8 text: byte 0x{raw[at]:02x} at offset {at}"


@pytest.mark.parametrize("size", [3, 4, 5, 1000])
@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("0123456789é".encode()[:-1], "is not UTF-8 text: byte 0xc3 at offset 10"),
        ("\ufeff0123".encode() + b"\xff", "is not UTF-8 text: byte 0xff at offset 7"),
        ("éééé".encode() + b"\0", "is not text: byte 0x00 at offset 8"),
        (b"", "is empty"),
        ("\ufeff".encode(), "is empty"),
    ],
)
def test_the_offset_is_that_within_the_file(raw, message, size, tmp_path):
    path = write(tmp_path / "text", raw)
    whole = f"^{re.escape(f'{path} {message}')}$"
    with pytest.raises(ValueError, match=whole):
        list(read_chunks(path, size))
    other = write(tmp_path / "other", "fine")
    with pytest.raises(ValueError, match=whole):
        prepare([other, path], tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_a_byte_order_mark_is_one_at_the_beginning_alone(tmp_path):
    path = write(tmp_path / "text", "\ufeff\ufeffabc\ufeff")
    for size in (3, 6, 100):
        assert "".join(text for text, _ in read_chunks(path, size)) == "\ufeffabc\ufeff"


# --- preparing ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_pieces")
def test_a_prepared_text_is_the_text_in_memory(tmp_path):
    parts = [TEXT[:1000], "\ufeff" + TEXT[1000:1001], TEXT[1001:]]
    paths = [write(tmp_path / str(n), part) for n, part in enumerate(parts)]
    header = prepare(paths, tmp_path / "new" / "out")
    assert set(content(tmp_path / "new" / "out")) == {TOKENS, HEADER}
    tokens, vocabulary, sha256 = open_tokens(tmp_path / "new" / "out")
    in_memory = CharTokenizer.of(TEXT).encode(TEXT)
    assert vocabulary.characters == CharTokenizer.of(TEXT).characters
    assert tokens.dtype == "<u2"
    np.testing.assert_array_equal(tokens, in_memory)
    assert vocabulary.decode(tokens) == TEXT
    raw = (tmp_path / "new" / "out" / TOKENS).read_bytes()
    assert sha256 == hashlib.sha256(raw).hexdigest() == fingerprint(in_memory)
    assert header == json.loads((tmp_path / "new" / "out" / HEADER).read_text()) == {
        "format": "tinylm tokens", "version": 2, "dtype": "uint16", "tokens": len(TEXT),
        "tokenizer": {"kind": "characters", "characters": vocabulary.characters},
        "sources": [{"name": str(path), "bytes": path.stat().st_size} for path in paths], "sha256": sha256,
    }  # fmt: skip


@given(st.lists(st.text(CHARACTERS, min_size=1).map(lambda text: text.replace("\ufeff", "?")), min_size=1, max_size=3))
@pytest.mark.usefixtures("small_pieces")
def test_any_texts_come_back(tmp_path, texts):
    prepare([write(tmp_path / str(n), text) for n, text in enumerate(texts)], tmp_path / "out", force=True)
    tokens, vocabulary, _ = open_tokens(tmp_path / "out")
    assert vocabulary.decode(tokens) == "".join(texts)
    assert list(vocabulary.characters) == sorted(set("".join(texts)))


@pytest.mark.parametrize(("different", "dtype"), [(65_535, "<u2"), (65_536, "<u4"), (70_000, "<u4")])
def test_a_token_is_as_wide_as_the_vocabulary_needs(different, dtype, tmp_path):
    text = "".join(map(chr, range(0x10000, 0x10000 + different)))
    prepare([write(tmp_path / "text", text)], tmp_path / "out")
    tokens, vocabulary, _ = open_tokens(tmp_path / "out")
    assert (tokens.dtype, vocabulary.vocab_size) == (dtype, different)
    np.testing.assert_array_equal(tokens, np.arange(different))


@pytest.mark.parametrize("left", [HEADER, TOKENS])
def test_what_a_folder_holds_is_kept_unless_told(left, prepared, tmp_path):
    other = write(tmp_path / "other", "another text")
    (prepared / "notes").write_text("mine")
    (prepared / ({HEADER, TOKENS} - {left}).pop()).unlink()
    before = content(prepared)
    with pytest.raises(ValueError, match=f"already holds {left}: .* --force"):
        prepare([other], prepared)
    assert content(prepared) == before
    prepare([other], prepared, force=True)
    tokens, vocabulary, _ = open_tokens(prepared)
    assert vocabulary.decode(tokens) == "another text"
    assert (prepared / "notes").read_text() == "mine"


def test_until_it_is_whole_there_is_nothing_and_the_old_stays(prepared, tmp_path):
    text, fresh, before = write(tmp_path / "text", "another text"), tmp_path / "fresh", content(prepared)
    fresh.mkdir()
    for folder, expected in ((fresh, {}), (prepared, before)):
        (folder / f".{TOKENS}.abc.tinylm").write_text("left behind by a killed program")
        (folder / f".{HEADER}.abc.tinylm").write_text("left behind by a killed program")
        seen = []

        def look(what, done, folder=folder, seen=seen):
            seen.append((what, done))
            assert {name: raw for name, raw in content(folder).items() if not name.startswith(".")} == expected  # noqa: B023

        prepare([text], folder, force=True, show=look)
        assert seen == [("vocabulary", 12), ("tokens", 12)]
        assert set(content(folder)) == {HEADER, TOKENS}
        assert len(open_tokens(folder)[0]) == 12


@pytest.mark.parametrize("fails", [1, 2, 3])  # the first writing to the disk: of the tokens; the second: of the header
def test_a_full_disk_leaves_what_was_there(fails, prepared, tmp_path, monkeypatch):
    before, calls, fsync = content(prepared), [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    text = write(tmp_path / "text", "another text")
    for folder in (tmp_path / "new" / "out", prepared):
        calls.clear()
        with pytest.raises(OSError, match=f"^cannot write into {folder}: No space left on device; nothing was kept$"):
            prepare([text], folder, force=True)
    assert not (tmp_path / "new").exists()
    if fails < 3:
        assert content(prepared) == before
    else:  # between the two renames: there must be no header beside the tokens of another text
        assert content(prepared).get(HEADER) is None


@pytest.mark.parametrize("later", ["a text at", "a t", "a tixt"])
def test_a_text_that_changes_meanwhile_is_refused(later, tmp_path, monkeypatch):
    text, survey = write(tmp_path / "text", "a text"), preparing._survey

    def then_change(texts):
        found = survey(texts)
        write(text, later)
        return found

    monkeypatch.setattr(preparing, "_survey", then_change)
    with pytest.raises(ValueError, match="the text changed while it was being read"):
        prepare([text], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- opening ------------------------------------------------------------------------------------------------------


def edited(**changes):
    def edit(folder):
        path = folder / HEADER
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def rewritten(name, raw):
    return lambda folder: (folder / name).write_bytes(raw)


def cut(by):
    return lambda folder: os.truncate(folder / TOKENS, (folder / TOKENS).stat().st_size + by)


SIZE = 2 * len(TEXT)
FOREIGN = "F/header.json is damaged, or was not written by tinylm"
DAMAGES = {
    "no folder": (shutil.rmtree, "cannot read F/header.json: No such file or directory; `tinylm prepare`"),
    "no header": (lambda f: (f / HEADER).unlink(), "cannot read F/header.json: No such file or directory"),
    "no tokens": (lambda f: (f / TOKENS).unlink(), "cannot read F/tokens.bin: No such file or directory"),
    "not JSON": (rewritten(HEADER, b"{"), FOREIGN),
    "not text": (rewritten(HEADER, b"\xff\xfe\xfa"), FOREIGN),
    "not a table": (rewritten(HEADER, b"[1]"), FOREIGN),
    "foreign": (rewritten(HEADER, b'{"version": 1}'), FOREIGN),
    "foreign format": (edited(format="GGUF", version=3), FOREIGN),
    "later version": (edited(version=3), "F/header.json is of version 3, and this tinylm reads versions 1 and 2"),
    "dtype": (edited(dtype="int8"), FOREIGN),
    "dtype list": (edited(dtype=["uint16"]), FOREIGN),
    "no number of tokens": (edited(tokens=None), FOREIGN),
    "no tokens at all": (edited(tokens=0), FOREIGN),
    "no tokenizer": (edited(tokenizer=None), FOREIGN),
    "vocabulary twice": (edited(tokenizer={"kind": "characters", "characters": "aba"}), FOREIGN),
    "vocabulary list": (edited(tokenizer={"kind": "characters", "characters": ["a", "b"]}), FOREIGN),
    "of the first version": (edited(version=1, vocabulary="aba"), FOREIGN),
    "unknown tokenizer": (edited(tokenizer={"kind": "mine"}), "F/header.json needs the tokenizer 'mine', which is not"),
    "no fingerprint": (edited(sha256=None), FOREIGN),
    "truncated": (cut(-1), f"F/tokens.bin has {SIZE - 1} bytes, but {SIZE} by its header: it is damaged"),
    "too long": (cut(2), f"F/tokens.bin has {SIZE + 2} bytes, but {SIZE} by its header: it is damaged"),
    "emptied": (rewritten(TOKENS, b""), f"F/tokens.bin has 0 bytes, but {SIZE} by its header"),
    "wider": (edited(dtype="uint32"), f"F/tokens.bin has {SIZE} bytes, but {2 * SIZE} by its header"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_what_is_damaged_is_named(damage, message, prepared):
    damage(prepared)
    with pytest.raises(ValueError, match="^" + re.escape(message.replace("F/", f"{prepared}/"))) as caught:
        open_tokens(prepared)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("at", [0, 6, 7, 8, 100, len(TEXT) - 1])
@pytest.mark.usefixtures("small_pieces")
def test_a_token_outside_the_vocabulary_is_refused(at, prepared):
    size = CharTokenizer.of(TEXT).vocab_size
    raw = np.memmap(prepared / TOKENS, "<u2", "r+")
    raw[at] = size - 1
    open_tokens(prepared)
    raw[at] = size
    message = f"{prepared / TOKENS}: token {size} at position {at} is outside its header's vocabulary of {size}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        open_tokens(prepared)
    raw[-1] = 0xFFFF
    with pytest.raises(ValueError, match=f"token ({size}|65535) at position {at} "):  # the first one is named
        open_tokens(prepared)


# --- training from it ---------------------------------------------------------------------------------------------


def test_batches_and_evaluation_are_those_of_the_tokens_in_memory(prepared):
    tokens, vocabulary, _ = open_tokens(prepared)
    in_memory = CharTokenizer.of(TEXT).encode(TEXT)
    for of_file, loaded in zip(split(tokens), split(in_memory), strict=True):
        assert isinstance(of_file, Tokens)
        for step in range(5):
            for a, b in zip(get_batch(of_file, 7, 8, 1, step), get_batch(loaded, 7, 8, 1, step), strict=True):
                assert type(a) is np.ndarray
                np.testing.assert_array_equal(a, b)
    model = GPT(GPTConfig(block_size=8, vocab_size=vocabulary.vocab_size, n_layer=1, n_head=1, n_embd=8))
    assert evaluate(model, split(tokens)[1], 4, 8) == evaluate(model, split(in_memory)[1], 4, 8)


def test_tokens_behave_as_an_array(prepared):
    tokens, _, _ = open_tokens(prepared)
    plain = np.fromfile(prepared / TOKENS, "<u2")
    first, second = tokens[:100], tokens[50:][::2]
    assert tokens[3] == plain[3]
    assert type(tokens[[1, 2]]) is type(tokens[tokens < 5]) is np.ndarray
    np.testing.assert_array_equal(first, plain[:100])  # a view is still right after later looks
    np.testing.assert_array_equal(second, plain[50::2])
    np.testing.assert_array_equal((tokens + 1)[2:4], plain[2:4] + 1)
    assert tokens.max() == plain.max()
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def resident(path):
    """KB of a mapped file that are in this process's memory."""
    maps = Path("/proc/self/smaps").read_text()
    (mapping,) = re.findall(rf"{path}\n(?:.+:.+\n)+?Rss: +(\d+) kB", maps)
    return int(mapping)


@LINUX
def test_a_look_lets_go_of_the_pages_of_earlier_looks(tmp_path):
    path = tmp_path / TOKENS
    np.zeros(16 << 20, "<u2").tofile(path)  # 32 MB
    tokens = Tokens(path, "<u2", "r")
    for start in range(0, len(tokens), 1 << 20):
        assert tokens[start : start + (1 << 20)].max() == 0
    for step in range(100):
        get_batch(tokens, 12, 64, 0, step)
    # The last batch's twelve windows; how much the kernel maps around each, up to 2 MB, depends on its page cache.
    assert resident(path) <= 24 << 10
    np.asarray(tokens).max()
    assert resident(path) == 32 << 10  # without releasing pages


AT_SIZE = """
import re, sys
from pathlib import Path
import numpy as np
from tinylm import GPT, GPTConfig
from tinylm.data import get_batch, open_tokens, prepare, split
from tinylm.training import TrainConfig, TrainState, evaluate, train

def peak_mb(key="VmHWM"):
    return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

if sys.argv[1] == "prepare":
    del sys.argv[1]
    prepare.main()
else:
    tokens, vocabulary, _ = open_tokens(sys.argv[1])
    train_tokens, val_tokens = split(tokens)
    model = GPT(GPTConfig(block_size=64, vocab_size=vocabulary.vocab_size, n_layer=2, n_head=2, n_embd=64))
    state = TrainState(model, TrainConfig(steps=10, eval_every=0, lr=1e-2, warmup=2))
    losses = [step.loss for step in train(state, train_tokens, val_tokens[:50_000])]
    print("loss", losses[0], losses[-1])
    for step in range(1000):  # as much of the file as a long run would touch
        get_batch(train_tokens, 12, 64, 1, step)
    for start in range(0, len(val_tokens), 49_152):  # and as an evaluation of the whole tail would
        np.asarray(val_tokens[start : start + 49_153], np.int64)
print("peak", peak_mb())
"""


@LINUX
@pytest.mark.slow
def test_two_gigabytes_are_trained_on_in_300_mb(tmp_path):
    """2 GB of Greek text, two bytes per letter, become 2 GB of tokens."""
    if shutil.disk_usage(tmp_path).free < 6e9:
        pytest.skip("needs 6 GB on the disk")
    letters = np.array(list("αβγδεζηθικλμνξοπρστυφχψω ,.\n"))
    often = np.random.default_rng(0).geometric(0.2, size=1_000_003).clip(max=len(letters))  # some letters, to be learnt
    block = "".join(letters[often - 1])
    raw = block.encode()
    times = -(-2 * 10**9 // len(raw))

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, "-c", AT_SIZE, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT
        )
        assert done.returncode == 0, done.stderr
        print(done.stdout)
        return done.stdout, float(re.search(r"^peak (.+)$", done.stdout, re.M)[1])

    try:
        with open(tmp_path / "text", "wb") as file:
            for _ in range(times):
                file.write(raw)
        _, peak = run("prepare", tmp_path / "text", "--out", tmp_path / "out")
        assert peak < 300
        assert (tmp_path / "text").stat().st_size >= 2 * 10**9
        (tmp_path / "text").unlink()
        tokens = np.memmap(tmp_path / "out" / TOKENS, "<u2", "r")
        assert len(tokens) == times * len(block)
        ids = CharTokenizer.of(block).encode(block)
        for n in (0, times // 2, times - 1):
            np.testing.assert_array_equal(tokens[n * len(block) : (n + 1) * len(block)], ids)
        told, peak = run(tmp_path / "out")
        assert peak < 300
        first, last = map(float, re.search("loss (.+) (.+)", told).groups())
        assert last < first
    finally:
        shutil.rmtree(tmp_path)


def test_the_example_trains_the_same_on_a_text_and_on_its_prepared_folder(tmp_path):
    write(tmp_path / "text", TEXT)
    prepare([tmp_path / "text"], tmp_path / "prepared")
    program = Path(__file__).parents[1] / "examples" / "train_char.py"
    small = [
        "--n-layer=1",
        "--n-head=1",
        "--n-embd=8",
        "--block-size=16",
        "--batch-size=4",
        "--steps=6",
        "--dropout=0.1",
    ]
    runs = {"text": ("text",), "prepared": ("prepared",), "less": ("prepared", "--eval-tokens", "100")}
    losses = {}
    for name, arguments in runs.items():
        done = subprocess.run(
            [sys.executable, program, *small, "--out", tmp_path / f"run-{name}", "--data", *arguments],
            cwd=tmp_path, capture_output=True, encoding="utf-8", env=ENVIRONMENT, timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"text        {len(TEXT):,} tokens, a vocabulary of {len(set(TEXT))}")
        losses[name] = json.loads((tmp_path / f"run-{name}" / "summary.json").read_text())["val_loss"]
    assert losses["text"] == losses["prepared"] != losses["less"]
    # A run goes on with the same data in the other form.
    done = subprocess.run(
        [sys.executable, program, "--resume", "--steps=8", "--data=text", "--out", tmp_path / "run-prepared"],
        cwd=tmp_path, capture_output=True, encoding="utf-8", env=ENVIRONMENT, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


# --- the command --------------------------------------------------------------------------------------------------


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "tinylm", *map(str, arguments)], capture_output=True, encoding="utf-8",
        env=ENVIRONMENT, timeout=60, **options,
    )  # fmt: skip


def test_the_command_prepares_and_tells(tmp_path):
    write(tmp_path / "a", "one"), write(tmp_path / "b", "two")
    done = command("prepare", "b", "a", "b", "--out", "new/out", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(
        "text        9 tokens, a vocabulary of 5\nwritten     new/out/tokens.bin (18 B), new/out/"
    )
    tokens, vocabulary, _ = open_tokens(tmp_path / "new" / "out")
    assert vocabulary.decode(tokens) == "twoonetwo"


def test_the_progress_is_plain_lines_where_nobody_watches(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "text", b"x" * 2_500_000)
    monkeypatch.setattr(preparing, "PERIOD", 0.0)
    monkeypatch.setattr(sys, "argv", ["tinylm prepare", str(path), "--out", str(tmp_path / "out")])
    main()
    lines = capsys.readouterr().out.splitlines()
    done = ["1.0 MB", "2.1 MB", "2.5 MB"]
    assert lines[:6] == [f"{what:11} {n} of 2.5 MB" for what in ("vocabulary", "tokens") for n in done]
    assert lines[7].startswith("written ")


def test_the_progress_is_bars_on_a_terminal(tmp_path):
    write(tmp_path / "text", b"x" * 5_000_000)
    reader, terminal = os.openpty()
    environment = {**ENVIRONMENT, "TERM": "xterm-256color", "COLUMNS": "100"}
    program = subprocess.Popen(
        [sys.executable, "-m", "tinylm", "prepare", "text", "--out", "out"], cwd=tmp_path, env=environment,
        stdin=terminal, stdout=terminal, stderr=terminal,
    )  # fmt: skip
    os.close(terminal)
    written = b""
    try:
        while part := os.read(reader, 1 << 16):
            written += part
    except OSError:  # how Linux ends a terminal that its program has left
        pass
    os.close(reader)
    assert program.wait(60) == 0
    assert "━" in written.decode()
    assert b"5.0/5.0 MB" in written
    assert b"written " in written
    assert written.count(b"\x1b[?25l") == written.count(b"\x1b[?25h") == 1  # the cursor comes back


MISTAKES = {
    "nothing": ("", "the following arguments are required: FILE, --out"),
    "no out": ("good", "the following arguments are required: --out"),
    "unknown": ("good --out o --tokenizer words", "invalid choice: 'words'"),
    "missing": ("good none --out o", "cannot read none: No such file or directory"),
    "folder": ("folder --out o", "cannot read folder: Is a directory"),
    "latin1": ("good latin1 --out new/o", "latin1 is not UTF-8 text: byte 0xe9 at offset 3"),
    "binary": ("good zeros --out new/o", "zeros is not text: byte 0x00 at offset 2"),
    "empty": ("good empty --out new/o", "empty is empty"),
    "pipe": ("pipe --out o", "cannot read pipe twice: save it as a file first"),
    "taken": ("good --out taken", "taken already holds header.json: choose another folder, or replace it with"),
    "out is a file": ("good --out good", "cannot write into good: it is not a folder"),
    "out below a file": ("good --out good/o", "cannot write into good/o: Not a directory"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, raw in {"good": b"a text", "latin1": b"caf\xe9", "zeros": b"ab\0", "empty": b""}.items():
        write(tmp_path / name, raw)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    prepare(["good"], "taken")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["tinylm prepare", *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        main()
    told = capsys.readouterr()
    assert (stop.value.code, told.out) == (2, "")
    assert told.err.startswith("tinylm prepare: error: ")
    assert message in told.err
    assert told.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(tmp_path):
    write(tmp_path / "text", b"x" * 500_000)

    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = command("prepare", "text", "--out", "new/out", cwd=tmp_path, preexec_fn=little_room)
    assert done.returncode == 1
    assert done.stderr == "tinylm prepare: error: cannot write into new/out: File too large; nothing was kept\n"
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / "text", TEXT)

    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(preparing, "_encoded", interrupt)
    monkeypatch.setattr(sys, "argv", ["tinylm prepare", str(path), "--out", str(tmp_path / "new" / "out")])
    with pytest.raises(KeyboardInterrupt, match="before the end: nothing was written"):
        main()
    assert list(tmp_path.iterdir()) == [path]


def test_the_mistakes_of_reading_are_the_same_in_one_piece(tmp_path):
    assert read_text(write(tmp_path / "text", "\ufeffhé\r\n")) == "hé\r\n"
    with pytest.raises(ValueError, match="none: No such file or directory"):
        read_text(tmp_path / "none")
