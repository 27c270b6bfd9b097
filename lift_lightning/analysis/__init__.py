"""What a model knows and what training did to it: spectra, updates, selections, noise, memory.

Pure functions on tensors in `spectra`, `updates`, ...; `commands` is what `python main.py analyze NAME` runs.
"""
