"""`python main.py COMMAND ...`: the same as the console script `lift-lightning`; `--help` lists the commands."""

import sys

try:
    from lift_lightning.cli import main
except ModuleNotFoundError as error:
    if error.name is None or not error.name.startswith("lift_lightning."):
        raise
    # Beside this file stands the half of the package that setuptools does not map, and it was found first.
    sys.exit(f"{error}: from a clone of the repository, install it with `pip install -e .` and run this again")

if __name__ == "__main__":
    main()
