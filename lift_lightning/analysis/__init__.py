"""What a model knows and what training did to it: spectra, updates, selections, noise, memory.

Pure functions on tensors in `spectra`, `updates`, `masks`; `lift_lightning.analyze_commands` has the commands.
"""
