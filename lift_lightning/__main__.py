"""`python -m lift_lightning COMMAND ...`, the same as `lift-lightning COMMAND ...`."""

from lift_lightning.cli import main

main()
