"""Is this machine fit for the job? Checks that run the program's own parts on it and say what they found."""

import os


def leave_driver_asleep() -> None:
    """Lets torch ask the driver's management library whether there is a GPU, and not the driver.

    A driver that was woken in this process cannot be used in one that is forked from it.
    """
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
