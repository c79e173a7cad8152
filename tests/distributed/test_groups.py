"""Barriers, collectives and groups of ranks; one error for all ranks when one of them fails or dies."""

import re
import signal
import time

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from ranks import Ended, run_ranks, started, wait, wait_for_output

from iet_finetune.distributed.groups import Group, Placement, Ranks
from iet_finetune.distributed.placement import gathered_places, split_sizes
from iet_finetune.errors import UserError

TIMEOUT = 3.0
# From the end of the promise to the end of a process on a busy machine.
SLACK = 10.0

counts = st.integers(1, 24)


@st.composite
def placements(draw):
    num_shards, num_ranks = draw(counts), draw(counts)
    assume(num_shards >= num_ranks or num_ranks % num_shards == 0)
    return Placement.plan(num_shards, num_ranks)


@given(placements())
def test_every_shard_is_trained_by_one_group_and_the_groups_load_the_ranks_evenly(placement):
    trained = {shard: [] for shard in range(placement.num_shards)}
    for rank in range(placement.num_ranks):
        for shard in placement.shards_of(rank):
            assert placement.members(shard)[placement.member(rank)] == rank
            trained[shard].append(rank)
    for shard, ranks in trained.items():
        assert ranks == placement.members(shard) == list(range(ranks[0], ranks[0] + placement.group_size))
        assert placement.leader(shard) == ranks[0]
    loads = [len(placement.shards_of(rank)) for rank in range(placement.num_ranks)]
    assert max(loads) - min(loads) <= 1


@given(placements(), st.data())
def test_waves_cover_the_shards_in_order_and_use_no_rank_twice(placement, data):
    first = data.draw(st.integers(0, placement.num_shards))
    waves = list(placement.waves(first))
    assert sum(waves, []) == list(range(first, placement.num_shards))
    for wave in waves:
        ranks = [rank for shard in wave for rank in placement.members(shard)]
        assert len(ranks) == len(set(ranks))
        assert len({shard // placement.num_ranks for shard in wave}) == 1
    assert len(waves) == len({shard // placement.num_ranks for shard in range(first, placement.num_shards)})


@given(placements())
def test_the_idle_ranks_are_those_without_a_shard_in_the_last_of_several_waves(placement):
    *others, last = placement.waves(0)
    busy = {rank for shard in last for rank in placement.members(shard)}
    assert placement.idle() == sorted(set(range(placement.num_ranks)) - busy)
    assert others or not placement.idle()


@given(counts, counts)
def test_a_refusal_names_the_nearest_choices_and_each_is_accepted(num_shards, num_ranks):
    assume(num_shards < num_ranks and num_ranks % num_shards)
    with pytest.raises(UserError, match=f"`--num_shards {num_shards}` does not divide {num_ranks} ranks") as caught:
        Placement.plan(num_shards, num_ranks)
    named = r"use `--num_shards (\d+)` or (\d+), or start (\d+) or (\d+) ranks"
    fewer, more, below, above = map(int, re.search(named, str(caught.value)).groups())
    for shards in (fewer, more):
        Placement.plan(shards, num_ranks)
    for ranks in (below, above):
        Placement.plan(num_shards, ranks)
    assert fewer < num_shards < more
    assert below < num_ranks < above
    between = [(k, num_ranks) for k in range(fewer + 1, more)] + [(num_shards, w) for w in range(below + 1, above)]
    for refused in between:
        with pytest.raises(UserError):
            Placement.plan(*refused)


@given(st.integers(0, 40), st.integers(1, 9))
def test_the_slices_of_a_micro_batch_are_even_and_form_the_whole_in_order(count, size):
    members = [Group(size, member) for member in range(size)]
    for positions in (range(count), list("abcdefgh" * 5)[:count]):
        slices = [list(group.local_slice(positions)) for group in members]
        assert sum(slices, []) == list(positions)
        assert [len(each) for each in slices] == members[0].sizes(count) == split_sizes(count, size)
        assert max(map(len, slices)) - min(map(len, slices)) <= 1


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 6))
def test_gathered_samples_are_put_into_the_order_of_the_micro_batches(batches, size):
    members = [Group(size, member) for member in range(size)]
    numbers = iter(range(sum(batches)))
    whole = [[next(numbers) for _ in range(samples)] for samples in batches]
    sent = [[number for batch in whole for number in member.local_slice(batch)] for member in members]
    width, places = gathered_places(batches, size)
    assert width == max(map(len, sent))
    gathered = [number for values in sent for number in values + [None] * (width - len(values))]
    assert [gathered[place] for place in places] == sum(whole, [])


def test_a_slice_has_the_type_of_the_whole():
    assert Group(3, 1).local_slice(range(5, 12)) == range(8, 10)
    assert Group(3, 2).local_slice(np.arange(7)).tolist() == [5, 6]


def test_a_single_rank_gets_back_what_it_passes():
    ranks, tensor = Ranks.alone(), torch.arange(3.0)
    assert (ranks.rank, ranks.size, ranks.local_rank, ranks.is_main) == (0, 1, 0, True)
    assert ranks.all_to_all(tensor) is tensor
    assert ranks.all_gather(tensor) is tensor
    ranks.broadcast(tensor, 0)
    assert tensor.tolist() == [0, 1, 2]
    assert ranks.all_gather_object({"a": (0.1, None)}) == [{"a": [0.1, None]}]
    assert ranks.is_last_to("write")
    group, module = ranks.group(Placement.plan(3, 1)), torch.nn.Linear(1, 1)
    assert group.wrap(module) is module
    assert group.all_gather(torch.ones(2, 3)).shape == (1, 2, 3)
    ranks.check()
    ranks.barrier()
    ranks.leave()


def test_a_process_without_torch_distributed_joins_as_the_only_rank():
    ranks = Ranks.join(1.0)
    assert (ranks.size, ranks.device.type) == (1, "cpu")


@pytest.mark.parametrize("error", [UserError("a line"), ValueError("a bug"), KeyboardInterrupt()], ids=type)
def test_a_single_rank_raises_the_error_unchanged(error):
    with pytest.raises(type(error)) as caught, Ranks.alone().report_errors_once():
        raise error
    assert caught.value is error
    assert getattr(error, "printed_here", None) is None


GOOD = """
    random = torch.Generator().manual_seed(ranks.rank)
    parts = torch.randn(ranks.size * 5, generator=random)
    emit(ranks.local_rank)
    emit(ranks.all_gather_object([0.1 + ranks.rank, 1e-310, "ä"]))
    emit(ranks.all_to_all(parts).tolist())
    ranks.barrier()
    emit(ranks.all_to_all(parts.double(), barrier=False).tolist())
    emit(ranks.all_gather(parts[:3]).tolist())
    number = torch.tensor([ranks.rank])
    ranks.broadcast(number, ranks.size - 1)
    emit(number.item())
    if ranks.is_main:
        time.sleep(0.5)
    arrived = time.monotonic()
    ranks.barrier()
    emit([arrived, time.monotonic()])
    with ranks.first_on_machine():
        begin = time.monotonic()
        time.sleep(0.2 if ranks.local_rank == 0 else 0)
        emit([begin, time.monotonic()])
    emit(ranks.all_gather_object(ranks.is_last_to("write")))

    placement = Placement.plan(max(ranks.size // 2, 1), ranks.size)
    group = ranks.connect(placement)
    torch.manual_seed(ranks.rank)
    module = torch.nn.Linear(3, 1)
    module.register_buffer("own", torch.zeros(1))
    network = group.wrap(module)
    module.own += ranks.rank
    inputs = torch.arange(6.0).view(2, 3) * (ranks.rank + 1) ** 2
    with group.no_sync(network):
        network(inputs[:1]).sum().backward()
    apart = module.weight.grad.tolist()
    network(inputs[1:]).sum().backward()
    weights = module.weight.detach()
    emit([group.size, group.member, apart, module.weight.grad.tolist(), group.all_gather(weights).tolist()])
    emit(module.own.item())

    if ranks.rank == 1:
        time.sleep(0.3)
    ranks.leave()
    ranks.leave()
    again = Ranks.join(TIMEOUT)
    emit(again.all_gather_object(ranks.rank))
    again.leave()
"""


@pytest.fixture(scope="module", params=[2, 4])
def good(request):
    """Two or four ranks that ran everything once; the four on two machines, according to their launcher."""
    machines = {rank: {"LOCAL_RANK": str(rank % 2)} for rank in range(4)} if request.param == 4 else {}
    ended = run_ranks(GOOD, request.param, environments=machines)
    assert [(end.code, end.stderr) for end in ended] == [(0, "")] * request.param
    return dict(enumerate(zip(*(end.output for end in ended), strict=True)))


def parts_of(rank, size):
    """What rank `rank` passes to `all_to_all`."""
    return torch.randn(size * 5, generator=torch.Generator().manual_seed(rank)).tolist()


def test_a_rank_knows_its_local_rank_with_and_without_the_launcher_setting_it(good):
    assert good[0] == ((0, 1) if len(good[0]) == 2 else (0, 1, 0, 1))


def test_gathered_values_come_by_rank_with_exact_floats(good):
    size = len(good[1])
    assert list(good[1]) == [[[0.1 + rank, 1e-310, "ä"] for rank in range(size)]] * size


@pytest.mark.parametrize("place", [2, 3], ids=["float32", "float64"])
def test_all_to_all_brings_each_rank_its_part_from_every_rank(good, place):
    size = len(good[place])
    for rank, received in enumerate(good[place]):
        assert received == [parts_of(source, size)[rank * 5 + i] for source in range(size) for i in range(5)]


def test_all_gather_concatenates_the_tensors_by_rank(good):
    size = len(good[4])
    assert list(good[4]) == [[x for rank in range(size) for x in parts_of(rank, size)[:3]]] * size


def test_a_broadcast_overwrites_with_the_source(good):
    assert set(good[5]) == {len(good[5]) - 1}


def test_a_barrier_waits_for_the_slowest_rank(good):
    arrived, left = zip(*good[6], strict=True)
    assert max(arrived) <= min(left)


def test_the_first_rank_of_every_machine_finishes_before_the_others_begin(good):
    first = [end for rank, (_, end) in enumerate(good[7]) if rank % 2 == 0]
    assert max(first) <= min(begin for rank, (begin, _) in enumerate(good[7]) if rank % 2)


def test_exactly_one_rank_is_the_last(good):
    assert all(sorted(last) == [False] * (len(last) - 1) + [True] for last in good[8])


def test_gradients_are_averaged_over_the_group_alone_at_the_last_micro_batch(good):
    rows = {rank: torch.arange(6.0).view(2, 3) * (rank + 1) ** 2 for rank in range(len(good[9]))}
    for rank, (size, member, apart, averaged, _) in enumerate(good[9]):
        mates = [rank - rank % 2, rank - rank % 2 + 1]
        assert (size, member) == (2, rank % 2)
        assert apart == [rows[rank][0].tolist()]
        assert averaged == [(sum(rows[mate].sum(dim=0) for mate in mates) / 2).tolist()]


def test_a_group_starts_from_the_weights_of_its_first_member_and_gathers_by_member(good):
    for rank, (*_, gathered) in enumerate(good[9]):
        torch.manual_seed(rank - rank % 2)
        assert gathered == [torch.nn.Linear(3, 1).weight.tolist()] * 2


def test_a_forward_does_not_change_the_buffers_of_a_member(good):
    assert list(good[10]) == list(range(len(good[10])))


def test_ranks_that_have_left_can_join_again(good):
    assert list(good[11]) == [list(range(len(good[11])))] * len(good[11])


def survivors_of(ended: list[Ended], victim: int) -> list[Ended]:
    """Returns the others after checking that they ended by themselves in time."""
    (died,) = ended[victim].output
    others = [end for rank, end in enumerate(ended) if rank != victim]
    assert all(end.at < died + TIMEOUT + SLACK for end in others)
    assert all(end.code in (1, 2) for end in others), [(end.code, end.stderr) for end in others]
    return others


CANNOT_CONNECT = r"^error: all ranks are there, but they cannot exchange tensors \({}\): set `GLOO_SOCKET_IFNAME` to "


@pytest.mark.parametrize(
    ("happens", "why"),
    [
        ("time.sleep(60)", "not within 3 s"),
        ("raise RuntimeError('no route to host')", "no route to host"),
        ("output.zero_()", "other numbers come than were sent"),
    ],
    ids=["hangs", "fails", "is wrong"],
)
def test_a_network_that_carries_no_tensors_is_one_line_before_anything_is_loaded(happens, why):
    body = f"""
    def all_to_all_single(output, input, group):
        {happens}
    dist.all_to_all_single = all_to_all_single
    ranks.connect(Placement.plan(2, 2))
"""
    ended = run_ranks(body, 2, TIMEOUT)
    assert [end.code for end in ended] == [2, 2]
    (line,) = [line for end in ended for line in end.said]
    assert re.search(CANNOT_CONNECT.format(why), line)


def test_a_collective_that_stands_still_while_all_ranks_are_alive_ends_the_run():
    body = "    dist.all_to_all_single = lambda *tensors: time.sleep(60)\n    ranks.all_to_all(torch.ones(2))"
    ended = run_ranks(body, 2, TIMEOUT)
    assert [end.code for end in ended] == [1, 1]
    (line,) = [line for end in ended for line in end.said]
    assert "error: all ranks are there, but tensors no longer go from one to the other (`--ddp_timeout 3`)" in line


# One waits at a barrier, one trains, and one is inside a collective, which Python cannot interrupt.
WAYS_TO_WAIT = """
    if ranks.rank == {victim}:
        time.sleep(0.3)
        die(signal.{how})
    if ranks.rank == {stuck}:
        dist.recv(torch.ones(1), src={victim})
    if ranks.is_main or ranks.rank == {waits}:
        ranks.barrier()
    while True:
        time.sleep(0.01)
        ranks.check()
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_when_a_rank_dies_or_freezes_all_others_end_and_one_names_it(how):
    body = WAYS_TO_WAIT.format(victim=1, stuck=3, waits=0, how=how)
    others = survivors_of(run_ranks(body, 4, TIMEOUT, frozen=1 if how == "SIGSTOP" else None), victim=1)
    (line,) = [line for end in others for line in end.said]
    assert re.search(r"error: rank 1 has not answered for \d s: .*`--ddp_timeout 3`.*_checkpoint latest`", line)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_when_the_rank_that_hosts_the_store_dies_or_freezes_all_others_end_and_one_says_so(how):
    body = WAYS_TO_WAIT.format(victim=0, stuck=3, waits=1, how=how)
    others = survivors_of(run_ranks(body, 4, TIMEOUT, frozen=0 if how == "SIGSTOP" else None), victim=0)
    (line,) = [line for end in others for line in end.said]
    assert re.search(r"error: lost contact with rank 0 .*`--ddp_timeout 3`.*_checkpoint latest`", line)


def test_ranks_that_die_together_are_named_together():
    body = """
    if ranks.rank in (1, 2):
        die(signal.SIGKILL)
    ranks.barrier()
"""
    ended = run_ranks(body, 4, TIMEOUT)
    (line,) = [line for end in ended for line in end.said]
    assert "ranks 1, 2 have not answered" in line


def test_a_job_that_was_suspended_as_a_whole_continues():
    body = """
    emit("ready")
    end = time.monotonic() + 1.7 * TIMEOUT
    while time.monotonic() < end:
        time.sleep(0.01)
        ranks.check()
"""
    with started(body, 2, TIMEOUT) as running:
        wait_for_output(running, 1)
        for what, seconds in ((signal.SIGSTOP, TIMEOUT), (signal.SIGCONT, 0)):
            for rank in running:
                rank.send(what)
            time.sleep(seconds)
        ended = wait(running)
    assert [(end.code, end.said) for end in ended] == [(0, []), (0, [])]


def test_an_error_of_one_rank_ends_all_and_that_rank_prints_it():
    body = """
    if ranks.rank == 1:
        raise UserError("`--data x` is wrong.")
    if ranks.rank == 2:
        time.sleep(100)  # it never looks
    if ranks.is_main:
        ranks.barrier()
    while True:
        ranks.check()
"""
    ended = run_ranks(body, 4, TIMEOUT)
    assert [end.code for end in ended] == [2, 2, 1, 2]
    assert [end.said for end in ended] == [[], ["error: `--data x` is wrong."], [], []]
    assert [end.output for end in ended] == [["`--data x` is wrong."], [], [], ["`--data x` is wrong."]]


def test_an_error_on_all_ranks_is_printed_by_one():
    ended = run_ranks("    raise UserError(f'{ranks.rank} sees it.')", 3)
    (printed,) = [rank for rank, end in enumerate(ended) if end.said]
    assert ended[printed].said == [f"error: {printed} sees it."]
    assert [end.output for rank, end in enumerate(ended) if rank != printed] == [[f"{printed} sees it."]] * 2
    assert {end.code for end in ended} == {2}


def test_a_bug_keeps_its_traceback_and_is_reported_to_the_others():
    body = """
    with ranks.first_on_machine():
        if ranks.is_main:
            raise ValueError("two\\nlines")
"""
    first, second = run_ranks(body, 2)
    assert first.code == 1
    assert re.search(r"(?s)Traceback .*in work\n.*ValueError: two\n.*lines\n$", first.stderr)
    assert (second.code, second.said) == (2, [])
    assert second.output == ["rank 0 ended with ValueError: two"]


def test_a_collective_that_fails_because_another_rank_had_an_error_ends_with_that_error():
    body = """
    if ranks.rank == 1:
        raise UserError("no space.")
    dist.recv(torch.ones(1), src=1)
"""
    first, second = run_ranks(body, 2)
    assert (first.code, first.output, first.said) == (2, ["no space."], [])
    assert (second.code, second.said) == (2, ["error: no space."])


def test_an_interrupt_passes_unchanged_and_is_not_reported():
    body = """
    if ranks.rank == 1:
        raise KeyboardInterrupt
    ranks.barrier()
"""
    first, second = run_ranks(body, 2, TIMEOUT)
    assert "KeyboardInterrupt" in second.stderr.splitlines()[-1]
    assert [first.code, *first.said][:1] == [2]
    assert "rank 1 has not answered" in first.said[0]
