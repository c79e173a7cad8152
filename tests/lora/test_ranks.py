"""The merge of LoRA clones over ranks: the same bits on any number of them, and after a stop amid a round."""

from pathlib import Path

import pytest
import torch
from lora.test_merger import LAYERS, bits, moved
from loras import adapted_unet
from ranks import run_ranks

from iet_finetune.distributed.groups import Placement, Ranks
from iet_finetune.ensemble.checkpoint import CheckpointStore
from iet_finetune.ensemble.ema import EMA
from iet_finetune.ensemble.host import HostMemory
from iet_finetune.lora.average import ExactAverageMerger
from iet_finetune.lora.merger import ExactMerger

CPU = torch.device("cpu")
CLONES = 5
# By round and clone; 0 takes no part. In the third round only one clone does, of a rank that is not the first.
WEIGHTS = [[4, 3, 0, 2, 1], [1, 1, 1, 1, 1], [0, 3, 0, 0, 0], [0, 1, 2, 0, 5]]
ONE_LAYER = "down_blocks.0.attentions.0.proj_in"


def play(ranks, start=(0, 0), resumed=None, store=None, layers=LAYERS):
    """Four rounds of five clones and their averages on all ranks; what every rank then holds, as hashes.

    Args:
        start: (round, shards finished) to go on from.
        resumed: the checkpoint of that moment.
        store: takes checkpoints in the middle of rounds.
    """
    _, adapter, trainable = adapted_unet(rank=2, lora_layers=layers)
    host = HostMemory(CPU)
    ema = EMA(trainable.parameters, 0.9, start_share=True)
    main = ExactMerger("denoiser", adapter, trainable.tensors, ranks, host)
    averages = ExactAverageMerger("ema", adapter, ema.tensors, main, ranks, host)
    placement = Placement.plan(CLONES, ranks.size)
    if resumed is not None:
        for merger in (main, averages):
            merger.restore(resumed, resumed.manifest["total"])
    said = []
    for round_ in range(start[0], len(WEIGHTS)):
        for wave in placement.waves(start[1] if round_ == start[0] else 0):
            mine = [shard for shard in wave if shard in placement.shards_of(ranks.rank)]
            weights = [0] * ranks.size
            for shard in wave:
                weights[placement.leader(shard)] = WEIGHTS[round_][shard]
            clone = average = None
            if mine:
                seed = 10 * round_ + mine[0]
                clone, average = moved(main.tensors, seed, 0.03), moved(averages.tensors, 100 + seed, 0.02)
            main.collect(clone, weights)
            averages.collect(average, weights)
            if store is not None and wave[-1] < CLONES - 1:
                versions = f"round {round_}", f"round {round_} after {wave[-1] + 1}"
                pieces = main.pieces(*versions) | averages.pieces(*versions)
                store.save(10 * round_ + wave[-1] + 1, pieces, {"total": main.total})
        change = main.merge()
        averages.merge()
        names = dict.fromkeys(main.rebased, torch.zeros(()))
        said.append([bits(main.tensors, main.remainders, names), bits(averages.tensors, averages.remainders)])
        said[-1] += [change, main.facts]
    return said


RANKS = """
import sys
sys.path.insert(0, "TESTS")
from pathlib import Path
from iet_finetune.ensemble.checkpoint import CheckpointStore
from iet_finetune.lora import sharing
from lora.test_ranks import ONE_LAYER, play

sharing.PORTION = 3000  # so that the layers go in many portions, where on one rank all are in one
emit(play(ranks, store=CheckpointStore(Path("FOLDER"), None, ranks)))
emit(play(ranks, layers=ONE_LAYER))
for step in STEPS:
    found = CheckpointStore(Path("OTHERS")).find(f"checkpoint-{step}")
    emit(play(ranks, divmod(step, 10), found))
"""


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    """Number of ranks -> (the folder of its checkpoints, what its ranks emitted); what one rank made."""
    folders = {size: tmp_path_factory.mktemp(f"on{size}") for size in (1, 2, 3)}
    expected = play(Ranks.alone(), store=CheckpointStore(folders[1]))
    output = {}
    for size, steps in ((2, (3, 11)), (3, (2, 14))):
        body = RANKS.replace("TESTS", str(Path(__file__).parents[1])).replace("FOLDER", str(folders[size]))
        body = body.replace("OTHERS", str(folders[size - 1])).replace("STEPS", str(steps))
        ended = run_ranks(body, size)
        assert [rank.code for rank in ended] == [0] * size, [rank.stderr for rank in ended]
        output[size] = [rank.output for rank in ended]
    return folders, output, expected


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_of_any_number_ends_every_round_with_the_same_bits(on_ranks, size):
    _, output, expected = on_ranks
    assert [of_rank[0] for of_rank in output[size]] == [expected] * size
    assert len({digest for said in expected for digest in said[:2]}) == 8


@pytest.mark.parametrize("size", [2, 3])
def test_with_fewer_layers_than_ranks_some_have_nothing_to_merge(on_ranks, size):
    _, output, _ = on_ranks
    assert [of_rank[1] for of_rank in output[size]] == [play(Ranks.alone(), layers=ONE_LAYER)] * size


@pytest.mark.parametrize("size", [2, 3])
def test_what_other_ranks_saved_in_the_middle_of_a_round_goes_on_to_the_same_bits(on_ranks, size):
    _, output, expected = on_ranks
    for of_rank in output[size]:
        assert of_rank[2:] == [expected, expected[1:]]


@pytest.mark.parametrize("step", [3, 13, 23])
def test_what_three_ranks_saved_is_taken_up_by_one(on_ranks, step):
    folders, _, expected = on_ranks
    found = CheckpointStore(folders[3]).find(f"checkpoint-{step}")
    assert play(Ranks.alone(), divmod(step, 10), found) == expected[step // 10 :]
