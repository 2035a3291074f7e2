"""PyTorch's autoload entry point (group `torch.backends`)."""


def autoload() -> None:
    """Do nothing yet."""
