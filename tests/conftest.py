"""For every test: one thread, no network, and no search for garbage among what the libraries hold."""

import gc
import os

import datasets
import pytest
import torch

from hub_configs import hub_configs  # noqa: F401  a fixture

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():  # kernels run in Triton's interpreter, which has to be known before it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def imported_for_good():
    """``train()`` ends with a garbage collection, which takes longer than a tiny run where millions of objects live."""
    gc.collect()
    gc.freeze()
    datasets.disable_progress_bars()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tensors this small gain nothing from threads, which wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
