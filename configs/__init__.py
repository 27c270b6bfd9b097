"""The configurations that come with the package: `lift-lightning fit --config configs/math10k.yaml` works anywhere."""
