"""What the commands give, written to one folder: two checkouts that behave alike write the same files.

    python benchmarks/golden.py OUT                 # of this checkout
    python benchmarks/golden.py OUT --package DIR   # of another one
    diff -r OUT OTHER

Losses are kept as the journal has them, to the last bit: compare on one machine, with the same libraries. Times, paths
and versions are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
COMMANDS = ("greedy", "dp-baseline", "eval", "calibrate", "export", "import", "report", "plan")
ENGINES = ("transformers", "vllm", "sglang", "trtllm", "lmdeploy", "atom", "vllm-ascend", "llamacpp", "megatron")
CHANGING = {"seconds", "time", "icsearch_version", "hardware", "torch", "transformers", "out", "wall", "started"}
SMALL = ("--num-sequences", "6", "--threads", "1", "--device", "cpu", "--quiet")


class Icsearch:
    """The command line of one checkout, run in an empty folder."""

    def __init__(self, package: Path, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ, "PYTHONPATH": str(package), "COLUMNS": "80", "TERMINAL_WIDTH": "80", "NO_COLOR": "1",
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ICSEARCH_CACHE": str(folder / "cache"),
        }  # fmt: skip

    def __call__(self, *arguments: str) -> str:
        """Exit status, stdout and stderr of one command."""
        command = [sys.executable, "-m", "icsearch", *arguments]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        return f"$ icsearch {' '.join(arguments)}\n{done.stdout}{done.stderr}exit {done.returncode}\n"


def steady(value: Any) -> Any:
    """JSON without what is another in every run."""
    if isinstance(value, dict):
        return {name: steady(inner) for name, inner in value.items() if name not in CHANGING}
    return [steady(inner) for inner in value] if isinstance(value, list) else value


def journal(path: Path) -> list[Any]:
    """All events but the first, whose options follow the version."""
    return [steady(json.loads(line)) for line in path.read_text().splitlines()[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--package", type=Path, default=HERE, help="the checkout to run")
    given = parser.parse_args()
    out: Path = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)

    def save(name: str, content: Any) -> None:
        text = content if isinstance(content, str) else json.dumps(content, indent=1, sort_keys=True)
        (out / name).write_text(text, encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        icsearch, runs = Icsearch(given.package.resolve(), Path(folder)), Path(folder) / "runs"
        config = HERE / "tests" / "data" / "configs" / "glm-5.json"
        save("help.txt", "".join(icsearch(*command) for command in [("--help",), *((c, "--help") for c in COMMANDS)]))
        save(
            "plan.txt",
            icsearch("plan", str(config), "--num-sequences", "64", "--seq-len", "65536", "--devices", "8xH200"),
        )
        for seed in ("0", "1"):
            shared = ("demo", "--calibration", "demo", "--seed", seed, *SMALL)
            searches = {
                "greedy": ("greedy", *shared, "--num-shared", "4"),
                "staged": ("greedy", *shared, "--num-shared", "3", "--stages", "2", "--keep-full", "5"),
                "kl": ("greedy", *shared, "--num-shared", "2", "--objective", "kl"),
                "swaps": ("greedy", *shared, "--num-shared", "8", "--refine", "swaps"),
                "dp": ("dp-baseline", *shared, "--retention", "1/4"),
            }
            for name, arguments in searches.items():
                if seed == "1" and name == "swaps":
                    continue
                told = icsearch(*arguments, "--out", str(runs / f"{name}-{seed}"))
                save(f"{name}-{seed}.txt", told.replace(folder, ""))
                save(f"{name}-{seed}.journal.json", journal(runs / f"{name}-{seed}" / "journal.jsonl"))
                save(
                    f"{name}-{seed}.pattern.json",
                    steady(json.loads((runs / f"{name}-{seed}/pattern.json").read_text())),
                )
                save(f"{name}-{seed}.curve.csv", (runs / f"{name}-{seed}" / "curve.csv").read_text())
            patterns = ("uniform:1/4", f"{runs}/greedy-{seed}", f"{runs}/dp-{seed}")
            told = icsearch(
                "eval", "demo", "--calibration", "demo:heldout", "--seed", seed, *SMALL,
                "--out", str(runs / f"eval-{seed}"),
                *(word for pattern in patterns for word in ("--pattern", pattern)),
            )  # fmt: skip
            save(f"eval-{seed}.txt", told.replace(folder, ""))
            save(f"eval-{seed}.json", steady(json.loads((runs / f"eval-{seed}" / "eval.json").read_text())))
        for engine in ENGINES:
            exports = [
                icsearch("export", str(runs / "greedy-0"), "--engine", engine),
                icsearch("export", "published:glm-5-1-4", "--engine", engine, "--model-config", str(config)),
                icsearch("export", "published:glm-5-1-4", "--engine", engine, "--serve-pp", "4"),
                icsearch("export", "published:glm-5.2-native", "--engine", engine),
                icsearch("import", "freq:4,offset:2", "--engine", engine),
                icsearch("import", str(config), "--engine", engine),
            ]
            save(f"engine-{engine}.txt", "".join(exports).replace(folder, "").replace(str(HERE), ""))


if __name__ == "__main__":
    main()
