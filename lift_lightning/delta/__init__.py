"""The result of a training as a small adapter: what of a checkpoint differs from its base, to the last bit."""
