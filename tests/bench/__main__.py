"""Run the benchmarks: ``python3 -m tests.bench [NAME ...]``.

Each prints a ratio against a base measured in the same run, the peer and the target.  Exit status 1 where a target is
missed.
"""
import importlib
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))


def main() -> int:
    """Run the named benchmark modules, or all."""
    here = pathlib.Path(__file__).parent
    names = sys.argv[1:] or sorted(path.stem for path in here.glob("bench_*.py"))
    missed = 0
    for name in names:
        start = time.monotonic()
        for row in importlib.import_module(f"tests.bench.{name}").run():
            shown = "not measured" if row["ratio"] is None else f"{row['ratio']:.3g} {row['unit']}"
            verdict = {True: "ok", False: "MISSED", None: "-"}[row["ok"]]
            missed += row["ok"] is False
            print(f"{verdict:7} {row['metric']}: {shown} (target {row['target']}; against {row['peer']})", flush=True)
        print(f"        {name} took {time.monotonic() - start:.0f} s", flush=True)
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
