"""How sure are the tests? Small faults are put into tinylm, one at a time; a test should fail at each.

    python benchmarks/mutation.py --sample 400 --seed 1 --jobs 2 --json mutants.json
    python benchmarks/mutation.py --list --files tinylm/ops/gelu.py

A mutant is the source with one place changed: + for -, < for <=, 2 for 1, a statement left out (see mutants.py). The
first test that fails, or does not end, kills it. A survivor asks: is a test missing, or does the change not matter?

Each job has a copy of the checkout. First all tests run there, unchanged, and it is noted which lines each of them
executes (kept in the user's cache folder until a file changes). A mutant is then tried by all tests of the files that
execute its line: first those tests that do so themselves, the fastest files ahead. Tests marked slow are left out.
What lies in tinylm/fused is tried under `--fused` too. At the end the tests that killed run on the unchanged code.
"""

import argparse
import hashlib
import itertools
import json
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

from mutants import Mutant, mutants
from mutation_plugin import IMPORT, LIMITS, LOG, TRACE

ROOT = Path(__file__).resolve().parent.parent
ENGINE = """
    array autograd composed creation dtypes errors generation gpt gradcheck half optim optimizer parallel precision
    random recompute registry settings tensor nn/**/* ops/**/* fused/**/*
"""
MODES = ("", "--fused")
STATUSES = ("killed", "timeout", "survived")

Suite = dict[str, dict[str, Any]]  # a label, see mutation_plugin.py -> {"seconds": ..., "lines": {file: [...]}}
_running: set[subprocess.Popen[bytes]] = set()
_mtimes = itertools.count(1)


class Broken(Exception):
    """The tests fail on the unchanged code."""


class Copy:
    """A copy of the checkout, where one process of tests runs at a time."""

    def __init__(self, folder: Path):
        self.folder, self.root = folder, folder / "checkout"
        ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
        shutil.copytree(ROOT, self.root, ignore=ignored)

    def test(self, limits: dict[str, float], *options: str, **environment: str) -> tuple[int, str, list[str]]:
        """Run these tests in this order, or all; returns pytest's status, its output, and our log."""
        scratch = self.folder / "scratch"  # for all that the tests write
        scratch.mkdir()
        (scratch / "limits").write_text(json.dumps(limits))
        (scratch / "log").touch()
        places = {"TMPDIR": scratch, "XDG_CACHE_HOME": scratch, "MPLCONFIGDIR": self.folder / "matplotlib"}
        places |= {LIMITS: scratch / "limits", LOG: scratch / "log"}
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
        env |= {"PYTHONPATH": f"{self.root}{os.pathsep}{self.root / 'benchmarks'}"}
        env |= {name: str(path) for name, path in places.items()} | environment
        command = [sys.executable, "-m", "pytest", "-q", "-pmutation_plugin", "-pno:cacheprovider", "-m", "not slow"]
        command += [*options, *sorted({_file(test) for test in limits} - {""})]
        with open(scratch / "output", "w+b") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            tests = subprocess.Popen(command, cwd=self.root, env=env, start_new_session=True, **streams)
            _running.add(tests)
            status = tests.wait()
            _running.discard(tests)
            _end(tests)  # what it has left running
        text, log = (scratch / "output").read_text(errors="replace"), (scratch / "log").read_text().splitlines()
        shutil.rmtree(scratch, ignore_errors=True)
        return status, text, log

    def learn(self, mode: str) -> Suite:
        """Run all tests on the unchanged code: how long each takes, and what it executes."""
        notes, hook = self.folder / "trace", self.root / "sitecustomize.py"
        hook.write_text("import mutation_plugin\n\nmutation_plugin.trace()\n")
        status, text, _ = self.test({"": 3600}, "-rf", *mode.split(), **{TRACE: str(notes)})
        hook.unlink()
        # Tracing is slow, which a test with a clock may see.
        if failed := re.findall(r"^FAILED (.+?)(?: - .*)?$", text, re.M):
            status, text, _ = self.test(dict.fromkeys(["", *failed], 3600), *mode.split())
        if status:
            raise Broken(f"the tests fail on the unchanged code {mode}\n{text[-4000:]}")
        suite: Suite = {}
        for label, seconds, lines in map(json.loads, notes.open()):
            known = suite.setdefault(label, {"seconds": 0.0, "lines": {}})
            known["seconds"] += seconds
            for file, seen in lines.items():
                known["lines"][file] = sorted({*seen, *known["lines"].get(file, ())})
        notes.unlink()
        del suite[""]  # between the tests
        return suite

    def judge(self, mutant: Mutant, suites: dict[str, Suite], timeout: float) -> dict[str, Any]:
        """Try the mutant; returns what became of it."""
        result: dict[str, Any] = {"status": "survived", "mode": "", "test": "", "error": "", "tests": 0}
        path, started = self.root / mutant.file, perf_counter()
        code, stat = path.read_bytes(), path.stat()
        compiled = b"numba" in code
        path.write_bytes(mutant.apply(code))
        os.utime(path, (mtime := next(_mtimes), mtime))  # a time of its own, lest stale bytecode runs
        try:
            for mode in MODES if _fused(mutant) else MODES[:1]:
                limits = plan(mutant, suites[mode], timeout, compiled)
                if len(limits) > 1 and result["status"] == "survived":
                    cache = {"NUMBA_CACHE_DIR": str(self.folder / "numba")} if compiled else {}
                    status, text, log = self.test(limits, "-x", *mode.split(), **cache)
                    tests = [line for line in log if line in limits]
                    result["tests"] += len(tests)
                    if status:
                        looped = any(line.startswith("Timeout (") for line in log)
                        error = (re.findall(r"^E +(.*)", text, re.M) or text.splitlines() or [""])[0]
                        result |= {"status": "timeout" if looped else "killed", "mode": mode}
                        result |= {"test": tests[-1] if tests else "collection", "error": f"{error} (status {status})"}
        finally:
            path.write_bytes(code)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            shutil.rmtree(self.folder / "numba", ignore_errors=True)
        return result | {"seconds": round(perf_counter() - started, 2)}


def _end(tests: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(tests.pid, signal.SIGKILL)


def _file(test: str) -> str:
    return test.partition("::")[0]


def _fused(mutant: Mutant) -> bool:
    return mutant.file.startswith("tinylm/fused/")


def in_order(tests: Iterable[str], suite: Suite, timeout: float, key: Any = lambda test: ()) -> dict[str, float]:
    """The seconds that each of these tests may take, sorted by `key`, then file by file, the fastest ahead."""
    seconds = {test: suite[test]["seconds"] for test in tests}
    together: Counter[Any] = Counter()
    for test in seconds:
        together[key(test), _file(test)] += seconds[test]
    order = sorted(seconds, key=lambda t: (key(t), together[key(t), _file(t)], _file(t), seconds[t]))
    return {"": timeout + 60, **{test: timeout + 10 * seconds[test] for test in order}}


def plan(mutant: Mutant, suite: Suite, timeout: float, compiled: bool) -> dict[str, float]:
    """The tests that try this mutant, as `in_order` has them: those ahead whose file is named after the mutant's."""

    def executes(label: str) -> bool:
        lines = suite[label]["lines"].get(mutant.file, ()) if label in suite else ()
        return bool(lines) if mutant.lines is None else any(mutant.lines[0] <= n <= mutant.lines[1] for n in lines)

    tests = [label for label in suite if "::" in label]
    direct = {label for label in suite if executes(label)}
    files, everywhere = {_file(label) for label in direct}, mutant.lines is None or executes(IMPORT)
    if compiled and not direct:  # numba's loops cannot be traced: who executes the files beside them comes first
        folder, everywhere = mutant.file.rpartition("/")[0], True
        direct = {test for test in tests if any(file.startswith(folder) for file in suite[test]["lines"])}
    names = Path(mutant.file).with_suffix("").parts[1:]

    def key(test: str) -> tuple[bool, bool]:
        return test not in direct, not any(name in _file(test) for name in names)

    return in_order([t for t in tests if everywhere or _file(t) in files], suite, timeout, key)


def learn(copies: Sequence[Copy], modes: Sequence[str]) -> dict[str, Suite]:
    """What the tests execute in each mode, from the cache folder if no file changed since."""
    memory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "tinylm", "mutation.json")
    hashed = hashlib.sha256(sys.version.encode())
    for path in sorted(path for path in copies[0].root.rglob("*") if path.is_file()):
        hashed.update(f"{path.relative_to(copies[0].root)} ".encode() + path.read_bytes())
    suites: dict[str, Suite] = {}
    with suppress(OSError, ValueError, KeyError):
        known = json.loads(memory.read_text())
        suites = known["suites"] if known["digest"] == hashed.hexdigest() else {}

    def remember(mode: str, suite: Suite) -> None:
        suites[mode] = suite
        memory.parent.mkdir(parents=True, exist_ok=True)
        memory.write_text(json.dumps({"digest": hashed.hexdigest(), "suites": suites}))

    if missing := [mode for mode in modes if mode not in suites]:
        print("running all tests on the unchanged code, to see what each executes", flush=True)
        in_copies(copies, lambda copy, mode: copy.learn(mode), missing, remember)
    return suites


def in_copies(copies: Sequence[Copy], work: Any, items: Sequence[Any], done: Any) -> None:
    """`done(item, work(copy, item))` for each item, as they come, with one copy each."""
    free: queue.SimpleQueue[Copy] = queue.SimpleQueue()
    for copy in copies:
        free.put(copy)

    def one(item: Any) -> Any:
        copy = free.get()
        try:
            return work(copy, item)
        finally:
            free.put(copy)

    pool = ThreadPoolExecutor(len(copies))
    futures = {pool.submit(one, item): item for item in items}
    try:
        for future in as_completed(futures):
            done(futures[future], future.result())
    finally:  # interrupted, or broken: end what still runs
        pool.shutdown(wait=False, cancel_futures=True)
        while not all(future.done() for future in futures):
            for tests in [*_running]:
                _end(tests)
            sleep(0.05)


def check(copy: Copy, results: dict[Mutant, dict[str, Any]], suites: dict[str, Suite], timeout: float) -> None:
    """The tests that killed must pass on the unchanged code, in the order in which they killed."""
    for mode, suite in suites.items():
        killers = {r["test"] for r in results.values() if r["mode"] == mode and r["test"] in suite}
        if killers:
            status, text, _ = copy.test(in_order(killers, suite, timeout), *mode.split())
            if status:
                raise Broken(f"tests that killed fail on the unchanged code too {mode}\n{text[-4000:]}")


def report(results: dict[Mutant, dict[str, Any]]) -> None:
    """A line for each file, then the survivors."""
    counts: dict[str, Counter[str]] = {}
    for mutant, result in results.items():
        for file in (mutant.file, "~ all"):
            counts.setdefault(file, Counter())[result["status"]] += 1
    print(f"\n{'':34}" + "".join(f"{status:>10}" for status in (*STATUSES, "score")))
    for file, count in sorted(counts.items()):
        score = 1 - count["survived"] / count.total()
        print(f"{file:34}" + "".join(f"{count[status]:10}" for status in STATUSES) + f"{score:10.1%}")
    for mutant in sorted(results, key=lambda mutant: (mutant.file, mutant.start)):
        if results[mutant]["status"] == "survived":
            print(f"survived {results[mutant]['tests']:4} tests: {mutant}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sample", type=int, metavar="N", help="try N mutants, drawn by --seed, instead of all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="how many at once; each takes a core")
    parser.add_argument("--files", nargs="+", type=Path, metavar="PATH", help="what to mutate (default: the engine)")
    parser.add_argument(
        "--timeout", type=float, default=60, help="seconds, and ten times its own, that a test may take"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every mutant and what became of it")
    parser.add_argument("--list", action="store_true", help="print the mutants, and try none")
    args = parser.parse_args()
    files = args.files or sorted(path for name in ENGINE.split() for path in (ROOT / "tinylm").glob(f"{name}.py"))
    chosen = [m for f in files for m in mutants(f.read_text(), f.resolve().relative_to(ROOT).as_posix())]
    if args.sample is not None:
        chosen = random.Random(args.seed).sample(chosen, min(args.sample, len(chosen)))
    if args.list or not chosen:
        print(*chosen, f"{len(chosen)} mutants", sep="\n")
        return 0

    results: dict[Mutant, dict[str, Any]] = {}

    def done(mutant: Mutant, result: dict[str, Any]) -> None:
        results[mutant] = result
        place = f"{len(results):4}/{len(chosen)}"
        print(f"{place} {result['status']:8} {result['seconds']:6.1f} s  {mutant}", flush=True)

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    wrong = ""
    with tempfile.TemporaryDirectory(prefix="tinylm-mutation-") as work:
        try:
            copies = [Copy(Path(work, str(i))) for i in range(args.jobs)]
            suites = learn(copies, MODES if any(map(_fused, chosen)) else MODES[:1])
            in_copies(copies, lambda copy, mutant: copy.judge(mutant, suites, args.timeout), chosen, done)
            check(copies[0], results, suites, args.timeout)
        except Broken as error:
            wrong = str(error)
        except KeyboardInterrupt:
            wrong = f"interrupted after {len(results)} of {len(chosen)} mutants"
    if results:
        report(results)
    if args.json:
        rows = [vars(mutant) | result for mutant, result in results.items()]
        args.json.write_text(json.dumps({"seed": args.seed, "chosen": len(chosen), "mutants": rows}, indent=1) + "\n")
    if wrong:
        print(wrong, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
