"""The training program: configuration, data, loop, checkpoints, logging."""
