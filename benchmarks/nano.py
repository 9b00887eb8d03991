"""Measures small models on all they were trained on; prints the tables of a model card.

    python benchmarks/nano.py MODEL... --frames FRAMES [--episodes 20] [--out FOLDER] [--card]

What is measured, `worldvla_libero.nano.card` says: success in closed loop, errors of chunks and of imagined frames
on the episodes of FRAMES that were held out (demonstrations with frames, as `worldvla replay --to hdf5` makes
them), sizes, cost. With --card the tables become the model's README.md. Finished evaluations of the same weights
in --out are read, not run again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import common

from worldvla_libero.nano.card import card, measure, tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--frames", type=Path, required=True, help="demonstrations with frames")
    parser.add_argument("--episodes", type=int, default=20, help="fixed initial states of each task")
    parser.add_argument("--workers", type=int, default=2, help="processes that simulate")
    parser.add_argument("--tasks", nargs="*", default=(), help="only these tasks, by name")
    parser.add_argument("--held-out", type=int, help="only so many held-out episodes")
    parser.add_argument("--out", type=Path, default=Path("worldvla-nano"))
    parser.add_argument("--card", action="store_true", help="write the tables into the model's README.md")
    options = parser.parse_args()

    results = {}
    for folder in options.models:
        results[folder.name] = measure(
            folder,
            options.frames,
            options.out,
            episodes=options.episodes,
            tasks=options.tasks,
            held_out=options.held_out,
            workers=options.workers,
            on_episode=lambda record: print(record.task_name, record.episode, record.outcome, file=sys.stderr),
        )
        if options.card:
            (folder / "README.md").write_text(card(folder.name, results[folder.name]), encoding="utf-8")
    common.print_machine(episodes=options.episodes, models=", ".join(results))
    for name, measured in results.items():
        print(f"\n## {name}\n\n{tables(measured)}")


if __name__ == "__main__":
    main()
