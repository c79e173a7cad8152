"""How long does the exact merge of LoRA clones take, and how much memory? Eight of rank 16 on Stable Diffusion 1.5.

Of the 16 transformer blocks of its UNet, all attention, feed-forward, input and output projections: 192 in their true
shapes, with random weights. No update may be formed as a dense matrix in the first round; later the clones go on from
what was kept, each with steps of its own, and the remainders grow until they are dense.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from running import MB, describe_machine, finish, print_table

from iet_finetune.lora.factors import as_matrix
from iet_finetune.lora.low_rank import Merged, merge_layer
from iet_finetune.lora.spectra import LowRank, Matrix, dense
from iet_finetune.planning.peaks import peak_resident, read_status

# Transformer blocks by their width: two on the way down and three on the way up at each, and one in the middle.
BLOCKS = {320: 5, 640: 5, 1280: 6}
TEXT_WIDTH = 768
MOST_SECONDS = 10.0
MOST_SECONDS_LATER = 15.0
# How far a clone moves in a later round, beside what it starts from.
STEP = 0.1
# Of the largest number in a layer's update, what float64 may lose.
ROUNDING = 1e-12


class Layer(NamedTuple):
    """One projection: its kind, outputs, and inputs with the kernel if it is a convolution."""

    kind: str
    outputs: int
    inputs: tuple[int, ...]

    @property
    def dense_bytes(self) -> int:
        """Of its update as a float64 matrix."""
        return 8 * self.outputs * self.inputs[0]


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clones", type=int, default=8, help="K")
    parser.add_argument("--rank", type=int, default=16, help="of every adapter")
    parser.add_argument("--rounds", type=int, default=7, help="merges in a row")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    return parser.parse_args(argv)


def layers_of_the_unet() -> Iterator[Layer]:
    """The projections that an adapter sits on."""
    for width, blocks in BLOCKS.items():
        for _ in range(blocks):
            for seen in (width, TEXT_WIDTH):  # attn1 sees the image, attn2 the text
                yield from [Layer("attention: to_q, to_out", width, (width,))] * 2
                yield from [Layer("attention: to_k, to_v", width, (seen,))] * 2
            yield Layer("feed-forward, wider", 8 * width, (width,))
            yield Layer("feed-forward, back", width, (4 * width,))
            yield from [Layer("proj_in, proj_out (1x1 convolutions)", width, (width, 1, 1))] * 2


def draw_clones(layer: Layer, clones: int, rank: int) -> list[LowRank]:
    """One layer's adapters in fp32, of the size that they have after some training."""
    kernel = layer.inputs[1:]
    pairs = [(torch.randn(layer.outputs, rank, *kernel), torch.randn(rank, *layer.inputs)) for _ in range(clones)]
    return [as_matrix(up * 1e-2, down * layer.inputs[0] ** -0.5) for up, down in pairs]


def move_clones(layer: Layer, kept: LowRank, clones: int) -> list[LowRank]:
    """One layer's adapters in fp32 after a round that began with the merged one."""
    moved = []
    for step in draw_clones(layer, clones, kept.rank):
        pairs = zip(kept, step, strict=True)
        moved.append(LowRank(*((old + STEP * old.norm() / new.norm() * new).float() for old, new in pairs)))
    return moved


def held_bytes(merged: Merged) -> int:
    """Of the factors that a layer has after the merge, or of its dense rest."""
    rest = [merged.rest] if isinstance(merged.rest, torch.Tensor) else merged.rest
    return sum(tensor.nbytes for tensor in (*merged.kept, *rest))


def error_of(merged: Merged, clones: list[LowRank], weights: list[int], before: Matrix | None = None) -> float:
    """The largest error of kept + rest beside the dense remainder + weighted mean, as a share of its largest one."""
    mean = sum(clone.dense() * weight for clone, weight in zip(clones, weights, strict=True)) / sum(weights)
    total = mean if before is None else mean + dense(before)
    return ((merged.kept.dense() + dense(merged.rest) - total).abs().max() / total.abs().max()).item()


Times = tuple[float, float]


def timed_merge(clones: list[LowRank], weights: list[int], rank: int, before: Matrix | None) -> tuple[Merged, Times]:
    """A layer's merge, its seconds on the clock and of the processor."""
    began, worked = time.perf_counter(), time.process_time()
    merged = merge_layer(clones, weights, rank, before)
    return merged, (time.perf_counter() - began, time.process_time() - worked)


def go_on(layers: list[Layer], merged: list[Merged], weights: list[int], check: bool) -> tuple[list[Times], float]:
    """One later round, in place; each layer's times, and the largest error if that is to be checked."""
    times, error = [], 0.0
    for place, (layer, (kept, rest, _)) in enumerate(zip(layers, merged, strict=True)):
        clones = move_clones(layer, kept, len(weights))
        merged[place], took = timed_merge(clones, weights, kept.rank, rest)
        times.append(took)
        if check:
            error = max(error, error_of(merged[place], clones, weights, rest))
    return times, error


def round_row(number: int, times: list[Times], merged: list[Merged]) -> dict[str, Any]:
    """A line of the second table."""
    return {
        "round": number,
        "seconds": sum(clock for clock, _ in times),
        "of processor": sum(worked for _, worked in times),
        "dense rests": sum(isinstance(layer.rest, torch.Tensor) for layer in merged),
        "held after MB": sum(map(held_bytes, merged)) / MB,
        "share of energy in the rest": sum(layer.lost_share for layer in merged) / len(merged),
    }


def rows_of(layers: list[Layer], times: list[Times], merged: list[Merged]) -> list[dict[str, Any]]:
    """A line of the table for each kind of layer, and one for all; of times on the clock and of the processor."""
    rows = []
    for kind in (*dict.fromkeys(layer.kind for layer in layers), "all"):
        places = [place for place, layer in enumerate(layers) if kind in (layer.kind, "all")]
        rows.append(
            {
                "projections": kind,
                "number": len(places),
                "seconds": sum(times[place][0] for place in places),
                "of processor": sum(times[place][1] for place in places),
                "factors after MB": sum(held_bytes(merged[place]) for place in places) / MB,
                "dense would be MB": sum(layers[place].dense_bytes for place in places) / MB,
                "share of energy in the rest": sum(merged[place].lost_share for place in places) / len(places),
            }
        )
    return rows


def later_rounds(
    layers: list[Layer], merged: list[Merged], weights: list[int], last: int
) -> tuple[list[dict[str, Any]], list[tuple[str, bool]]]:
    """The rounds from the second to the last, in place: the lines of the second table and what was wanted."""
    rows, error = [], 0.0
    for number in range(2, last + 1):
        times, error = go_on(layers, merged, weights, check=number == last)
        rows.append(round_row(number, times, merged))
    if not rows:
        return [], []
    took = rows[-1]["of processor"]
    return rows, [
        (f"round {last}: {took:.1f} s of processor are less than {MOST_SECONDS_LATER:.0f}", took < MOST_SECONDS_LATER),
        (f"kept + rest is then the dense remainder and mean update but for {error:.0e} of it", error < ROUNDING),
    ]


def main(argv: list[str]) -> int:
    """Measure, print, and say whether it is as fast and small as it should be."""
    args = parse(argv)
    torch.manual_seed(0)
    machine, layers = describe_machine(), list(layers_of_the_unet())
    clones = [draw_clones(layer, args.clones, args.rank) for layer in layers]
    weights = list(range(100, 100 + args.clones))
    merge_layer(clones[0], weights, args.rank)  # loads what the first call loads
    start = read_status().get("VmRSS", peak_resident())
    merged, times = map(list, zip(*(timed_merge(each, weights, args.rank, None) for each in clones), strict=True))
    above = peak_resident() - start  # before the check below, which forms dense updates
    error = max(map(error_of, merged, clones, [weights] * len(layers)))

    rows = rows_of(layers, times, merged)
    print(f"{args.clones} adapters of rank {args.rank}; {machine}")
    print_table(rows)
    held, largest = sum(map(held_bytes, merged)), max(layer.dense_bytes for layer in layers)
    seconds = sum(clock for clock, _ in times)
    print(f"Peak memory above the start: {above / MB:.0f} MB, of which the result is {held / MB:.0f} MB.")
    checks = [
        (f"first round: {seconds:.1f} s are less than {MOST_SECONDS:.0f}", seconds < MOST_SECONDS),
        (
            f"beside the result {(above - held) / MB:.0f} MB, less than the largest dense update's {largest / MB:.0f}",
            above - held < largest,
        ),
        (f"kept + rest is the dense mean update but for {error:.0e} of it", error < ROUNDING),
    ]
    rounds = [round_row(1, times, merged)]
    del clones
    more_rounds, more_checks = later_rounds(layers, merged, weights, args.rounds)
    rounds += more_rounds
    print_table(rounds)
    facts = {
        "machine": machine,
        "rows": rows,
        "rounds": rounds,
        "peak_above_start": above,
        "result": held,
        "error": error,
    }
    return finish(checks + more_checks, args.json, facts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
