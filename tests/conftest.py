import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it where tests fill uninitialised memory

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def mesh():
    """One rank."""
    from rcm_mcore.parallel.mesh import local_mesh

    with local_mesh() as one:
        yield one


@pytest.fixture(scope="module")
def same_rounding():
    """The results of Intel's BLAS depend on where in memory its operands happen to lie, unless it is told otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MKL_CBWR", "COMPATIBLE")
        yield


# Files that take minutes: first, so that neither of two workers ends with one while the other has nothing to do.
LONG = ("test_demo", "test_parallel", "test_training", "test_resume", "test_faults", "test_synthesize", "test_benchmark_step")


def pytest_collection_modifyitems(config, items):
    """GPU tests run where the GPUs are; long files first."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    present = torch.cuda.device_count()
    for item in items:
        for n in (1, 2, 4, 8):
            if item.get_closest_marker(f"gpu{n}") and present < n:
                item.add_marker(pytest.mark.skip(reason=f"needs {n} GPUs, this machine has {present}"))
