import pytest
import torch

from mbrl import device

torch.set_num_threads(1)  # tests run side by side; and sums come out in one order


def pytest_collection_modifyitems(items):
    if not device.available():
        skip = pytest.mark.skip(reason="no accelerator")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
