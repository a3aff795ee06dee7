"""Published PyTorch checkpoints to model folders."""
