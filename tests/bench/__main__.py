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
    known = sorted(path.stem for path in pathlib.Path(__file__).parent.glob("bench_*.py"))
    names = [name if name in known else f"bench_{name}" for name in sys.argv[1:]] or known
    if unknown := sorted({*names} - {*known}):
        print(f"there is no {' '.join(unknown)}; there are: {' '.join(name.removeprefix('bench_') for name in known)}")
        return 2
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
