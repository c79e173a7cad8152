"""`--num_processes N` of `train` and `fit`: starts N ranks on this machine, and ends as the one that spoke did."""

import logging
import os
import sys
import uuid

from ..errors import UserError

FLAG = "--num_processes"
# Seconds that ranks have to write a checkpoint when they are asked to end.
PATIENCE = 30


def split_off(argv: list[str]) -> tuple[int | None, list[str]]:
    """The number of ranks to start, None if it is not given, and the other arguments.

    Under a launcher, which has started the ranks already, the flag is left where it is, as an unknown one.

    Raises:
        UserError: not a positive whole number.
    """
    if "RANK" in os.environ:
        return None, argv
    rest, given = [], None
    words = iter(argv)
    for word in words:
        if word == FLAG:
            given = next(words, "")
        elif word.startswith(f"{FLAG}="):
            given = word.partition("=")[2]
        else:
            rest.append(word)
    if given is None:
        return None, argv
    if not given.isdecimal() or int(given) < 1:
        raise UserError(f"`{FLAG}` must be a whole number of at least 1, not {given!r}.")
    return int(given), rest


def start_ranks(count: int, module_arguments: list[str]) -> int:
    """Runs `python -m` with these words in so many ranks on this machine; returns the exit code.

    They are started by torch's own launcher, on which Accelerate's and torchrun stand; what it would report after the
    line with which a rank ends is not shown.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    # Each rank would else take all threads, which is many times slower.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        shutdown_timeout=PATIENCE,
    )
    try:
        elastic_launch(config, sys.executable)("-m", *module_arguments)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        # A rank that a signal has ended has its negative number here.
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    except SignalException:
        return 130
    return 0
