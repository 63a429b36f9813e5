"""Model-based reinforcement learning and dynamics reconstruction in PyTorch."""

__version__ = "0.1.0"
