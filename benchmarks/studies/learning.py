"""Study 4: learning and forgetting on the bundled model. `python -m benchmarks.studies.learning [--jobs 2]`.

Every method of `learning_cases.METHODS` at the eight rates of one grid, on validation questions and a seed of its own;
then five fresh seeds at the best rate, and three or five at rates between which 85% of the target is learned; then
LIFT's settings, one changed at a time. 200 steps of 16 rows, budgets matched. What was run is not run again;
`--only NAME` runs one case.

What was expected, written before the first run: the source kept better by LIFT than by LoRA and full fine-tuning, and
about as well by magnitude; the target learned by all within a few points, LIFT a little behind; the smallest entries
worse than the largest at the same rate; the choice of the rate to matter more for forgetting than the method.

Before the seeds around 85% of the target, with the runs of one seed seen: LIFT and random entries to keep nine tenths
of the source there, within each other's intervals, PiSSA and Spectral Adapter hardly less, full fine-tuning half, LoRA
a tenth. Before the settings, of which none had been run: more entries, more learned and more forgotten; the smallest
directions no better than random ones; a fixed mask to learn less; approximations of rank 4 to 64 alike.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context

from benchmarks.studies.bundled import train
from benchmarks.studies.learning_cases import METHODS, Case, all_cases
from benchmarks.studies.records import Run, Store

STUDY = "learning"


def run_case(case: Case) -> tuple[Case, Run]:
    """Train it in this process, and write it down."""
    _, file, settings = METHODS[case.method]
    options = {**settings, **case.options}
    found = train(file, case.lr, case.seed, options, split="validation" if case.tuning else "heldout")
    content = {"case": {"method": case.method, "variant": case.variant, "tuning": case.tuning}, **found}
    Store(STUDY).save(case.name, f"python -m benchmarks.studies.learning --only {case.name}", case.seed, content)
    return case, content


def pending(store: Store) -> list[Case]:
    """What is to be run next, in order."""
    return [case for case in all_cases(store) if not store.has(case.name)]


def run_all(store: Store, jobs: int) -> Iterator[tuple[Case, Run]]:
    """Everything that is not there yet, in `jobs` processes of one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers, which are started after this
    running: dict[Future, str] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        while True:
            names = set(running.values())
            waiting = [case for case in pending(store) if case.name not in names]
            for case in waiting[: jobs - len(running)]:
                running[pool.submit(run_case, case)] = case.name
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                running.pop(future)
                yield future.result()


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, of one thread each")
    parser.add_argument("--only", metavar="NAME", help="this run, whether it is there or not")
    parser.add_argument("--list", action="store_true", help="name what is still to be run")
    given = parser.parse_args(arguments)
    store, started = Store(STUDY), time.monotonic()
    if given.list:
        print("\n".join(case.name for case in pending(store)))
    elif given.only:
        case = next((case for case in all_cases(store) if case.name == given.only), None)
        if case is None:
            sys.exit(f"there is no run {given.only!r}: --list names those that are still to be run")
        _show(*run_case(case), started)
    else:
        for case, run in run_all(store, given.jobs):
            _show(case, run, started)


def _show(case: Case, run: Run, started: float) -> None:
    shares = ", ".join(f"{skill} {share:.1%}" for skill, share in run["accuracy"].items())
    print(f"{(time.monotonic() - started) / 60:6.1f} min  {case.name:>40}: {shares}", flush=True)


if __name__ == "__main__":
    main()
