"""Numbers, words, config files and paths of options that cannot be used: one line each, and nothing written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bad_input import Place, Row, Words
from icsearch.cli import app

HUGE = "9" * 400
SEARCH: dict[str, tuple[tuple[object, ...], str, str]] = {
    "retention 0": (("--retention", "0"), "retention 0 is out of range", "above 0 and at most 1"),
    "retention -1": (("--retention", "-1"), "retention -1 is out of range", "above 0 and at most 1"),
    "retention 2": (("--retention", "2"), "retention 2 is out of range", "above 0 and at most 1"),
    "retention 1": (("--retention", "1"), "nothing to flip", "give a smaller retention"),
    "retention 1/0": (("--retention", "1/0"), "'1/0' is not a number", "give a fraction"),
    "retention nan": (("--retention", "nan"), "'nan' is not a number", "give a fraction"),
    "retention inf": (("--retention", "inf"), "'inf' is not a number", "give a fraction"),
    "retention 1e400": (("--retention", "1e400"), "'1e400' is not a number", "give a fraction"),
    "retention 1e-999999999": (("--retention", "1e-999999999"), "is not a number", "give a fraction"),
    "retention of 400 digits": (("--retention", HUGE), "is not a number", "give a fraction"),
    "retention of nothing": (("--retention", ""), "'' is not a number", "give a fraction"),
    "retention of two lines": (("--retention", "1/4\n1/2"), "is not a number", "give a fraction"),
    "shared 0": (("--num-shared", "0"), "--num-shared 0 is out of range", "give at least 1"),
    "shared -1": (("--num-shared", "-1"), "--num-shared -1 is out of range", "give at least 1"),
    "shared abc": (("--num-shared", "abc"), "--num-shared", "--help"),
    "shared 1.5": (("--num-shared", "1.5"), "--num-shared", "--help"),
    "shared 400 digits": (("--num-shared", HUGE), "cannot share", "give --num-shared 5 or less"),
    "shared 5000 digits": (("--num-shared", "9" * 5000), "--num-shared", ""),
    "both": (("--num-shared", 2, "--retention", "1/2"), "both say how far to go", "give one of them"),
    "stages 0": (("--stages", "0"), "--stages 0 is out of range", "give 1 to 6"),
    "stages 400 digits": (("--stages", HUGE), "is out of range", "give 1 to 6"),
    "keep what is not there": (("--keep-full", "6"), "names layer 6", "expected DSA layers 0 to 5"),
    "keep words": (("--keep-full", "first"), "--keep-full has 'first'", "such as 0,5,9"),
    "a batch of 0": (("--batch-size", "0"), "--batch-size", "--help"),
    "a batch of -1": (("--batch-size", "-1"), "--batch-size", "--help"),
    "a batch of 400 digits": (("--batch-size", HUGE), "batch", ""),
    "threads 0": (("--threads", "0"), "--threads", "--help"),
    "threads of nobody": (("--threads", "1000000"), "--threads 1000000", "give"),
    "threads of 400 digits": (("--threads", HUGE), "--threads", "give"),
    "memory 0": (("--memory", "0"), "memory '0' is not a size", "8GB or 500MB"),
    "memory -1GB": (("--memory", "-1GB"), "memory '-1GB' is not a size", "8GB or 500MB"),
    "memory nan": (("--memory", "nan"), "memory 'nan' is not a size", "8GB or 500MB"),
    "memory of 400 digits": (("--memory", f"{HUGE}GB"), "is not a size", "8GB or 500MB"),
    "memory of one byte": (("--memory", "1B"), "raise --memory", ""),
    "elements 0": (("--block-elements", "0"), "--block-elements 0 is too small", "give 1024 or more"),
    "elements of 400 digits": (("--block-elements", HUGE), "--block-elements", "give"),
    "elements of reference": (("--block-elements", 4096, "--kernels", "reference"), "belongs to", "leave it out"),
    "a device of nobody": (("--device", "abacus"), "'abacus'", "cuda"),
    "a device that is not here": (("--device", "cuda:99"), "cuda", ""),
    "a dtype of nobody": (("--dtype", "int4"), "--dtype 'int4' is unknown", "give auto or float32"),
    "kernels of nobody": (("--kernels", "fast"), "--kernels 'fast' is unknown", "give auto or"),
    "offload of nobody": (("--offload", "moon"), "--offload 'moon' is unknown", "give auto or none"),
    "a strategy of nobody": (("--strategy", "guess"), "--strategy 'guess' is unknown", "give exact"),
    "an objective of nobody": (("--objective", "vibes"), "--objective 'vibes' is unknown", "give lm-loss or kl"),
    "a refinement of nobody": (("--refine", "magic"), "--refine 'magic' is unknown", "give swaps"),
    "a refinement on nothing": (("--refine", "swaps"), "needs --refine-on", "sequences"),
    "sequences without a refinement": (("--refine-on", "demo"), "--refine-on", "give both, or neither"),
    "a refinement on the same": (("--refine", "swaps", "--refine-on", "SAME"), "shares 5 of its 5", "give text"),
    "two processes of one": (("--dp", 2), "2 processes, and this is one", "torchrun"),
    "a pipeline of one": (("--pp", 3), "needs a multiple of 3 processes", "torchrun"),
    "no processes": (("--dp", 0), "--dp", "--help"),
    "a time-out of nothing": (("--timeout", "0"), "--timeout", "--help"),
    "a time-out of nan": (("--timeout", "nan"), "--timeout", ""),
    "a time-out without end": (("--timeout", "1e400"), "--timeout inf", "give"),
    "a seed of text": (("--seed", "lucky"), "--seed", "--help"),
    "sizes of ready tokens": (("--seq-len", 32), "have seq_len 40", "leave --seq-len out"),
    "an option of nobody": (("--retenton", "1/4"), "No such option: --retenton", "--help"),
    "an option without a value": (("--retention",), "--retention", "--help"),
    "a word too many": (("run",), "unexpected extra argument", "--help"),
}


@pytest.mark.parametrize("case", SEARCH)
def test_searches(place: Place, capfd: pytest.CaptureFixture[str], case: str) -> None:
    options, found, todo = SEARCH[case]
    words = [place.good.tokens if word == "SAME" else word for word in options]
    command = "greedy" if list(SEARCH).index(case) % 3 or set(map(str, words)) & GREEDY_ALONE else "dp-baseline"
    place.refuses(Row(lambda p: p.search(command, *words), found, todo), capfd)


GREEDY_ALONE = {"--strategy", "--objective", "--refine", "--refine-on", "--dp", "--pp"}

EVALUATIONS: dict[str, tuple[tuple[object, ...], str, str]] = {
    "no pattern": ((), "--pattern", "--help"),
    "retention of text": (("--pattern", "full", "--retention", "half"), "'half' is not a number", "give a fraction"),
    "retention of nothing": (("--pattern", "full", "--retention", ""), "'' is not a number", "give a fraction"),
    "tasks below 0": (("--pattern", "full", "--tasks", -1), "--tasks", "--help"),
    "tasks of 400 digits": (("--pattern", "full", "--tasks", HUGE), "--tasks", "give"),
    "tasks too short": (("--pattern", "full", "--tasks", 1, "--task-length", 2), "--task-length", ""),
    "tasks too long": (("--pattern", "full", "--tasks", 1, "--task-length", 10**6), "the model has 512", "smaller"),
    "measuring beyond the model": (("--pattern", "full", "--measure", 10**9), "the model has 512", "smaller"),
    "a context of 0": (("--pattern", "full", "--context", 0), "--context", "--help"),
    "a context of 400 digits": (("--pattern", "full", "--context", HUGE), "--context", "give"),
    "a harness that is not there": (("--pattern", "full", "--lm-eval", "hellaswag"), "lm-eval", "pip install"),
}


@pytest.mark.parametrize("case", EVALUATIONS)
def test_evaluations(place: Place, capfd: pytest.CaptureFixture[str], case: str) -> None:
    options, found, todo = EVALUATIONS[case]
    place.refuses(Row(lambda p: p.search("eval", *options), found, todo), capfd)


CALIBRATIONS: dict[str, tuple[tuple[object, ...], str, str]] = {
    "sequences of one token": (("--seq-len", 1), "--seq-len", "--help"),
    "sequences below index_topk": (("--seq-len", 8), "index_topk of 8", "use longer sequences"),
    "sequences beyond the model": (("--seq-len", 513), "512 positions", "--seq-len 512 or less"),
    "sequences of 400 digits": (("--seq-len", HUGE), "--seq-len a huge integer is out of range", "give at most"),
    "no sequences": (("--num-sequences", 0), "--num-sequences", "--help"),
    "sequences without end": (("--num-sequences", 10**12), "--num-sequences 1000000000000", "give"),
    "a seed of text": (("--seed", "1e3"), "--seed", "--help"),
    "no out": ((), "Missing option '--out'", "--help"),
}


@pytest.mark.parametrize("case", CALIBRATIONS)
def test_calibrations(place: Place, capfd: pytest.CaptureFixture[str], case: str) -> None:
    options, found, todo = CALIBRATIONS[case]
    out = () if case == "no out" else ("--out", "out")
    place.refuses(Row(lambda p: ("calibrate", p.good.checkpoint, "demo", *out, *options), found, todo), capfd)


PLANS: dict[str, tuple[tuple[object, ...], str, str]] = {
    "retention of nothing": (("--retention", ""), "'' is not a number", "give a fraction"),
    "devices of nobody": (("--devices", "8xK20"), "--devices '8xK20' is unknown", "such as 8xH200"),
    "no devices": (("--devices", "0xH200"), "--devices '0xH200' is unknown", "such as 8xH200"),
    "fewer than no devices": (("--devices", "-1xH200"), "is unknown", "such as 8xH200"),
    "sequences of 400 digits": (("--seq-len", HUGE), "--seq-len", ""),
    "sequences without end": (("--num-sequences", HUGE), "--num-sequences", ""),
    "a batch without end": (("--batch-size", HUGE), "--batch-size", ""),
    "memory of nan": (("--device-memory", "nan"), "is not a size", "8GB or 500MB"),
    "flops of inf": (("--device-flops", "inf"), "--device-flops 'inf' is not a rate", "such as"),
    "flops of 400 digits": (("--device-flops", HUGE), "--device-flops", "is not a rate"),
    "bandwidth of nothing": (("--bandwidth", "0"), "--bandwidth '0' is not a rate", "such as"),
    "a disk of 400 digits": (("--read-rate", f"{HUGE}GB/s"), "--read-rate", "is not a rate"),
    "a dtype of nobody": (("--dtype", "int4"), "--dtype 'int4' is unknown", "give auto or float32"),
    "stages without end": (("--stages", HUGE), "--stages", ""),
}


@pytest.mark.parametrize("case", PLANS)
def test_plans(place: Place, capfd: pytest.CaptureFixture[str], case: str) -> None:
    options, found, todo = PLANS[case]
    place.refuses(Row(lambda p: ("plan", "demo", *options), found, todo), capfd)


WORDS: dict[str, tuple[Words, str, str]] = {
    "a command of nobody": (("serach",), "No such command 'serach'", "--help"),
    "a dash": (("-",), "No such command '-'", "--help"),
    "an option of nobody": (("--verbos",), "No such option: --verbos", "--help"),
    "no model": (("greedy",), "Missing", "--help"),
    "no calibration": (("greedy", "demo"), "--calibration", "--help"),
    "no file": (("export",), "Missing argument 'FILE'", "--help"),
    "no engine": (("export", "pattern.json"), "--engine", ""),
    "no run": (("report", "--out", "page.html"), "Missing argument", "--help"),
    "a name that begins with a dash": (("export", "-pattern.json", "--engine", "vllm"), "No such option: -p", "--help"),
    "that name, after two dashes": (("export", "--engine", "vllm", "--", "-p.json"), "no file -p.json", "its path"),
}


@pytest.mark.parametrize("case", WORDS)
def test_words(place: Place, capfd: pytest.CaptureFixture[str], case: str) -> None:
    words, found, todo = WORDS[case]
    place.refuses(Row(lambda p: words, found, todo), capfd)


CONFIG_FILES: dict[str, tuple[str | bytes, str, str]] = {
    "no TOML": ("[greedy", "is not TOML", "expected TOML with tables"),
    "not UTF-8": (b"[greedy]\nout = '\xff'", "is not TOML", "expected TOML with tables"),
    "deep": ("a = " + "[" * 50_000, "is not TOML", "expected TOML with tables"),
    "a table of nobody": ("[gredy]\nseed = 1", "unknown table 'gredy'", "did you mean greedy"),
    "an option of nobody": ("[greedy]\nretenton = 1", "has no option 'retenton'", "did you mean retention"),
    "an option in no table": ("seed = 1", "seed stands in no table", "write it below [common]"),
    "a list for a number": ("[greedy]\nseed = [1, 2]", "seed is a list", "expected a text or a number"),
    "a word for a flag": ("[greedy]\nfresh = 'yes'", "fresh is 'yes'", "expected true or false"),
    "a number of no sequence": ("[greedy]\nnum-sequences = 0", "num-sequences", "from the config file"),
    "nan": ("[greedy]\nretention = nan", "'nan' is not a number", "give a fraction"),
    "a retention of nothing": ("[common]\nretention = ''", "'' is not a number", "give a fraction"),
    "a thing twice": ("[greedy]\nseed = 1\nseed = 2", "is not TOML", "expected TOML with tables"),
}


@pytest.mark.parametrize("case", CONFIG_FILES)
def test_config_files(place: Place, capfd: pytest.CaptureFixture[str], case: str) -> None:
    content, found, todo = CONFIG_FILES[case]
    place.refuses(Row(lambda p: p.greedy("--config", p.file("own.toml", content)), found, todo), capfd)


ENVIRONMENTS: dict[str, tuple[dict[str, str], str, str]] = {
    "processes by text": ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'", "use torchrun"),
    "no processes": ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'", "use torchrun"),
    "other digits": ({"WORLD_SIZE": "²"}, "WORLD_SIZE is '²'", "use torchrun"),
    "400 digits": ({"WORLD_SIZE": HUGE, "RANK": "0"}, "WORLD_SIZE", "torchrun"),
    "5000 digits": ({"WORLD_SIZE": "9" * 5000, "RANK": "0"}, "WORLD_SIZE", "torchrun"),
    "no rank": ({"WORLD_SIZE": "2"}, "RANK is ''", "use torchrun"),
    "a rank beyond": ({"WORLD_SIZE": "2", "RANK": "2"}, "ranks go from 0 to 1", "use torchrun"),
    "no master": ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR or MASTER_PORT is not set", "start with torchrun"),
    "a config file that is not there": ({"ICSEARCH_CONFIG": "own.toml"}, "no config file own.toml", "expected TOML"),
    "a seed of text": ({"ICSEARCH_GREEDY_SEED": "lucky"}, "--seed", "ICSEARCH_GREEDY_SEED"),
    "a retention of a space": ({"ICSEARCH_GREEDY_RETENTION": " "}, "' ' is not a number", "give a fraction"),
}


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_environments(
    place: Place, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    variables, found, todo = ENVIRONMENTS[case]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    place.refuses(Row(lambda p: p.greedy(), found, todo), capfd)


# --- where to write ---


def in_the_way(place: Place) -> Path:
    return place.file("taken", "in the way")


def link_into_nothing(place: Place) -> Path:
    (place.root / "link").symlink_to("nowhere/at/all")
    return place.root / "link"


def read_only(place: Place) -> Path:
    """A place where not even root may write."""
    return Path("/proc/icsearch/run")


OUTS: dict[str, tuple[Callable[[Place], object], str, str]] = {
    "a file": (in_the_way, "taken", "give another"),
    "below a file": (lambda p: in_the_way(p) / "run", "taken", "give another"),
    "a long name": (lambda p: "x" * 300, "File name too long", "give another"),
    "a long path": (lambda p: "x/" * 3000, "File name too long", "give another"),
    "a link into nothing": (link_into_nothing, "link", "give another"),
    "where nobody may write": (read_only, "/proc/icsearch", "give another"),
}
WRITERS = ("calibrate", "greedy", "dp-baseline", "eval")


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize("case", OUTS)
def test_places_that_cannot_be_written(
    place: Place, capfd: pytest.CaptureFixture[str], case: str, command: str
) -> None:
    make, found, _ = OUTS[case]

    def words(p: Place) -> Words:
        given = list(p.on(command, p.good.checkpoint))
        given[given.index("out")] = make(p)
        return given

    place.refuses(Row(words, found, "another"), capfd)


PAGES: dict[str, tuple[Callable[[Place], object], str, str]] = {
    "a directory": (lambda p: p.file("d/x").parent, "is a directory", "give the name of a file"),
    "in no directory": (lambda p: "nowhere/page.html", "no directory nowhere", "create it"),
    "below a file": (lambda p: in_the_way(p) / "page.html", "taken", "give another"),
    "a long name": (lambda p: "x" * 300, "File name too long", "give another"),
    "no name": (lambda p: "", "is a directory", "give the name of a file"),
}


@pytest.mark.parametrize("case", PAGES)
def test_pages_that_cannot_be_written(place: Place, capfd: pytest.CaptureFixture[str], case: str) -> None:
    make, found, todo = PAGES[case]
    place.refuses(Row(lambda p: ("report", p.good.greedy, "--out", make(p)), found, todo), capfd)


ODD_NAMES = ("with space", "..", "with\nbreak", "-dash", "übergrößenträger", "100%", "a@1", "[bold]", "'\"", "\udcff")


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_odd_names_are_names(place: Place, capfd: pytest.CaptureFixture[str], name: str) -> None:
    """What can be a name is one, for a run that is read and for what is written."""
    (place.root / "here").mkdir()
    out = place.root / "here" / name / "run"
    shutil.copytree(place.good.greedy, out)
    for words in (("export", out, "--engine", "vllm"), ("report", out, "--out", out.parent / "page.html")):
        assert app._run([str(word) for word in words], debug=False) == 0, capfd.readouterr()
    assert (out.parent / "page.html").stat().st_size > 1000


def test_a_search_in_an_odd_place(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """All that is odd at once, in the names of the checkpoint, the tokens and the run."""
    odd = place.root / "-ü \n[bold]%s@1'\udcff"
    odd.mkdir()
    model, tokens = (
        Path(shutil.copytree(path, odd / path.name)) for path in (place.good.checkpoint, place.good.tokens)
    )
    words = list(place.greedy("--num-shared", 3, model=model, tokens=tokens))
    words[words.index("out")] = odd / "run"
    assert app._run([str(word) for word in words], debug=False) == 0, capfd.readouterr()
    found, expected = (path / "curve.csv" for path in (odd / "run", place.good.greedy))
    assert found.read_bytes() == expected.read_bytes()
