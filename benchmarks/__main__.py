"""Run the benchmarks, all or those named: python -m benchmarks [limit flow sensing]."""

import importlib
import sys
from pathlib import Path

from benchmarks._measure import machine, write

NAMES = sorted(p.stem.removeprefix("bench_") for p in Path(__file__).parent.glob("bench_*.py"))


def main() -> None:
    """Run each benchmark and store its rows."""
    chosen = sys.argv[1:] or NAMES
    unknown = sorted(set(chosen) - set(NAMES))
    if unknown:
        sys.exit(f"there is no benchmark {', '.join(unknown)}; there are: {', '.join(NAMES)}")
    print(machine())
    for name in chosen:
        module = importlib.import_module(f"benchmarks.bench_{name}")
        print(f"\n{write(f'bench_{name}', module.run())}")


if __name__ == "__main__":
    main()
