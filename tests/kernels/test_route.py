"""route_slices against a loop over slices in Python, in double precision, and cases by hand."""

from __future__ import annotations

import math

import pytest
import torch

from meddanet.engine.routing import Tile
from meddanet.kernels import route_slices, route_slices_reference
from meddanet.kernels.route_call import new_frames, new_routing
from meddanet.med_danet_v2 import place

pytestmark = pytest.mark.usefixtures("nan_poisoning")
FUNCTIONS = (route_slices, route_slices_reference)
SIZE, CROPS, REACHES = (40, 57), (8, 24), (4, 6)
FRAMES = new_frames(SIZE, min(CROPS), CROPS, REACHES, "cpu")
NAN, INF = float("nan"), float("inf")


def one_hot(decisions):
    return torch.eye(len(FRAMES))[torch.tensor(decisions)]


def flags(samples):
    """Of slices that are all seen."""
    return torch.ones(samples, dtype=torch.int32)


def truth(logits, places, seen):
    """(decisions, offsets, per group a list of (slice, corner, start, shift)), one at a time."""
    decisions, offsets, groups = [], [], [[], [], []]
    sides = [SIZE, *((crop, crop) for crop in CROPS), SIZE]
    for n, (scores, logit, holds) in enumerate(
        zip(logits.tolist(), places.tolist(), seen.tolist(), strict=True)
    ):
        lost = [r for r, score in enumerate(scores) if math.isnan(score)]
        route = (lost or [scores.index(max(scores))])[0] if holds else 0
        offset, corner, start = [], [], []
        for axis in (0, 1):
            last = SIZE[axis] - sides[route][axis]
            share = 0 if logit[axis] < -700 else 1 / (1 + math.exp(-logit[axis]))
            position = (share - 0.5) * (SIZE[axis] - min(CROPS)) + last / 2
            if not holds:
                pixel = whole = 0
            elif math.isnan(position):
                pixel, whole = NAN, 0
            else:
                pixel = whole = round(min(max(position, 0), last))
            offset.append(pixel)
            corner.append(whole)
            crop = 0 < route < 3
            reach = REACHES[route - 1] if crop else 0
            tile = min(sides[route][axis] + 2 * reach, SIZE[axis])
            start.append(min(max(whole - reach, 0), SIZE[axis] - tile))
        decisions.append(route)
        offsets.append(offset)
        if route:
            shift = [s - c for s, c in zip(start, corner, strict=True)]
            groups[route - 1].append((n, corner, start, shift))
    return decisions, offsets, groups


def check(logits, places, seen):
    """Compares both executors with the truth, unused slots included; returns the decisions."""
    decisions, offsets, groups = truth(logits, places, seen)
    for function in FUNCTIONS:
        found = function(logits, places, seen, FRAMES)
        assert found.decisions.dtype == torch.int64 and found.decisions.tolist() == decisions
        expected = torch.tensor(offsets, dtype=torch.float32)
        torch.testing.assert_close(found.offsets, expected, rtol=0, atol=0, equal_nan=True)
        assert found.counts.flatten().tolist() == [len(group) for group in groups]
        for index, group in enumerate(groups):
            slices, _, *places_of = (part[index] for part in found[2:])
            unused = len(logits) - len(group)
            assert slices.tolist() == [slot[0] for slot in group] + [0] * unused
            for number, part in enumerate(places_of, 1):
                assert part.tolist() == [slot[number] for slot in group] + [[0, 0]] * unused
    return decisions


def far_from_halves(samples):
    """Logits of places whose offsets in pixels round the same way in any precision."""
    places, sides = torch.randn(samples, 2) * 2, torch.tensor(SIZE)
    for crop in CROPS:
        pixels = (places.sigmoid() - 0.5) * (sides - min(CROPS)) + (sides - crop) / 2
        places[(pixels - pixels.floor() - 0.5).abs() < 1e-3] = 0.3
    return places


@pytest.mark.parametrize("samples", [1, 3, 160, 256, 257, 600])
@pytest.mark.parametrize("kind", ["mixed", "skip", "crop", "whole", "nothing seen"])
def test_against_a_loop(samples, kind):
    logits, seen = torch.randn(samples, 4), flags(samples)
    if kind in ("skip", "crop", "whole"):
        logits[:, {"skip": 0, "crop": 2, "whole": 3}[kind]] += 100
    seen[torch.rand(samples) < 0.2] = 0
    if kind == "nothing seen":
        seen.zero_()
    decisions = check(logits, far_from_halves(samples), seen)
    if samples > 100 and kind == "mixed":
        assert set(decisions) == {0, 1, 2, 3}


def test_what_is_not_seen_is_skipped_whatever_the_networks_say():
    logits, places = torch.full((4, 4), NAN), torch.full((4, 2), NAN)
    logits[1:], places[2:] = one_hot([3, 1, 2]), torch.tensor([[9.0, 9.0], [INF, NAN]])
    assert check(logits, places, torch.zeros(4, dtype=torch.int32)) == [0] * 4


def test_by_hand():
    """Crops of 8 and 24 in a slice of 40 x 57: shares of 32 x 49 about the middle."""
    places = torch.tensor([[0.0, 0.0], [0.0, 0.0], [-9.0, 9.0], [-9.0, 9.0], [0.0, 0.0]])
    logits = one_hot([1, 2, 1, 2, 3])
    for function in FUNCTIONS:
        found = function(logits, places, flags(5), FRAMES)
        # 49 / 2 and 33 / 2 are halves: to even
        assert found.offsets.tolist() == [[16, 24], [8, 16], [0, 49], [0, 33], [0, 0]]
        assert found.slices.tolist() == [[0, 2, 0, 0, 0], [1, 3, 0, 0, 0], [4, 0, 0, 0, 0]]
        assert found.corner[0, :2].tolist() == [[16, 24], [0, 49]]
        # tiles of 16 and of 36 end with the slice
        assert found.start[:2, :2].tolist() == [[[12, 20], [0, 41]], [[2, 10], [0, 21]]]
        assert found.shift[:2, :2].tolist() == [[[-4, -4], [0, -8]], [[-6, -6], [0, -12]]]


@pytest.mark.parametrize("scores, route", [
    ([0, NAN, INF, NAN], 1), ([INF, 1, INF, 2], 0), ([-INF] * 4, 0), ([-INF, -INF, -3, -INF], 2),
    ([NAN] * 4, 0), ([1, 2, 2, 2], 1), ([0, -0.0, 0, 0], 0), ([0, 0, 0, NAN], 3),
])
def test_the_first_largest_logit_wins(scores, route):
    logits = torch.tensor([scores])
    assert logits.argmax(1).item() == route
    assert check(logits, torch.zeros(1, 2), flags(1)) == [route]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_places_at_every_border_and_none():
    """Both ends of both axes, beyond what single precision tells from them, and NaN."""
    ends = [-1000.0, -20.0, 0.2, 20.0, 1000.0, -INF, INF, NAN]
    places = torch.tensor([[y, x] for y in ends for x in ends for _ in range(4)])
    check(one_hot([0, 1, 2, 3] * len(ends) ** 2), places, flags(len(places)))


def test_the_models_place_and_the_engines_tile():
    """What this states anew, as the CPU's engine and the model state it."""
    places, decisions = torch.randn(300, 2) * 3, torch.arange(300) % 2 + 1
    crops = torch.tensor(CROPS)[decisions - 1][:, None]
    share, sides = places.sigmoid(), torch.tensor(SIZE, dtype=torch.float32)
    expected = place(share, min(CROPS), crops, sides).round()
    for function in FUNCTIONS:
        found = function(one_hot(decisions.tolist()), places, flags(300), FRAMES)
        assert torch.equal(found.offsets, expected)
        for group, (crop, reach) in enumerate(zip(CROPS, REACHES, strict=True)):
            corners, starts = found.corner[group, :150].tolist(), found.start[group, :150].tolist()
            for corner, start in zip(corners, starts, strict=True):
                tiles = [Tile.around(c, crop, side, reach // 2)
                         for c, side in zip(corner, SIZE, strict=True)]
                assert start == [tile.start for tile in tiles]


def test_slots_that_are_not_in_use_stay_valid(backend):
    """The next chunk uses fewer slots: the others keep what was valid for their group."""
    if backend != "triton":
        pytest.skip("the reference makes its outputs anew")
    from meddanet.kernels import route_triton

    found, bits = new_routing(5, 4, "cpu"), torch.full((3, 5), 8, dtype=torch.int32)
    found.decisions.fill_(9)
    found.offsets.fill_(NAN)
    for decisions in ([2, 0, 2, 2, 1], [0, 0, 0, 0, 2]):
        route_triton.run(
            one_hot(decisions), torch.full((5, 2), 9.0), flags(5), FRAMES, found, bits
        )
        assert found.decisions.tolist() == decisions and not bits.any()
        assert not found.offsets.isnan().any()
    assert found.counts.tolist() == [[0], [1], [0]]
    assert found.slices[:2].tolist() == [[4, 0, 0, 0, 0], [4, 2, 3, 0, 0]]
    assert found.corner[1].tolist() == [[16, 33]] * 3 + [[0, 0]] * 2


@pytest.mark.parametrize("samples", [1, 3, 8, 10])
def test_every_groups_part_is_aligned_as_an_allocation(samples):
    """Launches of all groups are one kind of launch to the JIT."""
    for part in new_routing(samples, 4, "cpu")[2:]:
        assert all(group.data_ptr() % 16 == 0 and group.is_contiguous() for group in part)


@pytest.mark.parametrize(("change", "message"), [
    ({"logits": torch.zeros(2, 3)}, r"logits must be \[2, 4\] and places \[2, 2\], got \[2, 3\]"),
    ({"places": torch.zeros(1, 2)}, r"and \[1, 2\]"),
    ({"seen": torch.ones(2)}, r"seen must be integers \[N\], got torch.float32 \[2\]"),
    ({"seen": torch.ones(2, 1, dtype=torch.int32)}, r"got torch.int32 \[2, 1\]"),
    ({"frames": FRAMES.float()}, r"frames must be int32 \[R, 4, 2\], got torch.float32"),
])
def test_bad_arguments(change, message):
    arguments = {
        "logits": torch.zeros(2, 4), "places": torch.zeros(2, 2), "seen": flags(2),
        "frames": FRAMES, **change,
    }
    for function in FUNCTIONS:
        with pytest.raises(ValueError, match=message):
            function(**arguments)
