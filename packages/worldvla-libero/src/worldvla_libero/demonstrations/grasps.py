"""Where a parallel-jaw gripper can take hold of an object from above without touching anything else.

Everything is read from collision geometry, so that a can, a carton and the rim of a bowl need no rules of their
own: the object must put enough surface between the finger pads, and the open gripper must be clear of the scene.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from worldvla_libero.demonstrations.scene import Array, Boxes

# The Panda gripper, open, in the frame of its grip site: x along the closing direction, z up; metres. Measured
# from robosuite's collision meshes; the parts of the arm above the hand are wider, but higher than any object.
FINGERTIP = -0.0092
_PAD_BOTTOM, _PAD_TOP = -0.004, 0.012
_PAD_HALF_WIDTH = 0.008
_WIDEST = 0.069  # what fits between the pads with some play
_FINGER_THICKNESS = 0.012
_GIVE = 0.002  # depth of a curved surface that still counts as touching a pad
_LEAST_AREA = 0.1  # share of a pad that has to touch
_REACH_UP = 0.2  # gripper parts are extended upwards: what they sweep when coming straight down
_PARTS = (  # centre, half size
    ((-0.052, 0.0, FINGERTIP + _REACH_UP / 2), (0.0135, 0.0105, _REACH_UP / 2)),
    ((0.052, 0.0, FINGERTIP + _REACH_UP / 2), (0.0135, 0.0105, _REACH_UP / 2)),
    ((0.0, 0.0, 0.031 + _REACH_UP / 2), (0.102, 0.021, _REACH_UP / 2)),
    ((0.0, 0.0, 0.083 + _REACH_UP / 2), (0.104, 0.032, _REACH_UP / 2)),
)

_ROOM = 0.012  # clearance beyond which more is worth nothing [m]
_ROOM_VALUE = 30.0  # what a metre of clearance is worth in cost
_VERTICAL_MARGIN = 0.003  # kept above what is below [m]
_SPACING = 0.003  # of the points an object is sampled with [m]
_GRID = 0.005  # of the heights and sideways offsets tried [m]
_NUM_YAWS = 24
_BATCH = 32  # candidates whose clearance is computed at a time

# The Panda arm with the hand straight down: its wrist is above the grip site and, seen from the arm, before it;
# with the elbow straight it is this far from the shoulder.
_WRIST_HEIGHT, _WRIST_INSET = 0.21, 0.088
_ARM_LENGTH = 0.695


def clearance(positions: Array, yaw: float, obstacles: Boxes) -> Array:
    """How far the open gripper, and its way straight down, stays from obstacles beside it.

    Args:
        positions: (P, 3) of the grip site [m].
        yaw: direction in which it closes [rad].
        obstacles: what not to touch. What is below a part of the gripper by a few millimetres is no obstacle to
            that part.

    Returns:
        (P,) lower bound of the distance to the nearest obstacle [m]; negative if it would touch.
    """
    if not len(obstacles):
        return np.full(len(positions), np.inf)
    # Seen from the hand, the gripper's parts are axis-aligned.
    to_hand = _to_hand(yaw)
    centres, axes = obstacles.centres @ to_hand.T, to_hand @ obstacles.axes  # (N, 3), (N, 3, 3)
    origins = positions @ to_hand.T
    # Separating axis theorem: two boxes are apart if and only if they are along one of these 15 directions.
    edges, frame = axes.swapaxes(1, 2), np.broadcast_to(np.eye(3), axes.shape)  # (N, 3, 3), a direction per row
    crosses = np.cross(frame[:, :, None], edges[:, None]).reshape(-1, 9, 3)
    directions = np.concatenate([frame, edges, crosses], axis=1)  # (N, 15, 3)
    lengths = np.linalg.norm(directions, axis=-1, keepdims=True)
    directions = np.where(lengths > 1e-6, directions / np.maximum(lengths, 1e-6), np.eye(3)[0])  # parallel edges
    obstacle_radius = np.einsum("nkj,nj->nk", np.abs(directions @ axes), obstacles.half_sizes)  # (N, 15)
    gaps = []
    for centre, half_size in _PARTS:
        apart = np.abs(np.einsum("pnj,nkj->pnk", origins[:, None] + centre - centres, directions))
        gap = (apart - np.abs(directions) @ np.asarray(half_size) - obstacle_radius).max(axis=-1)  # (P, N)
        bottom = origins[:, 2, None] + centre[2] - half_size[2]
        gaps.append(np.where(bottom > obstacles.tops + _VERTICAL_MARGIN, np.inf, gap))
    return np.min(gaps, axis=(0, 2))


def _to_hand(yaw: float) -> Array:
    """(3, 3) from the world's axes to some with z up and x along the closing direction."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, s, 0.0], [-s, c, 0.0], [0.0, 0.0, 1.0]])


def hand_rotation(closing: Array, approach: Array) -> Array:
    """(3, 3) rotation of the grip site: x along which the fingers close, z along which they point."""
    return np.stack([closing, np.cross(approach, closing), approach], axis=1)


@dataclass(frozen=True, eq=False)
class Grasp:
    """A grasp from straight above.

    Attributes:
        position: (3,) of the grip site, between the finger pads [m].
        yaw: direction in which the gripper closes, from the x axis [rad], in [0, π).
        cost: the less, the better.
    """

    position: Array
    yaw: float
    cost: float

    @property
    def rotation(self) -> Array:
        """(3, 3) of the grip site: its x axis is the closing direction, its z axis points down."""
        closing = np.array([np.cos(self.yaw), np.sin(self.yaw), 0.0])
        return hand_rotation(closing, approach=np.array([0.0, 0.0, -1.0]))


def plan_grasp(
    target: Boxes,
    obstacles: Boxes,
    shoulder: Array,
    *,
    home_yaw: float = np.pi / 2,
    avoid: Sequence[Grasp] = (),
) -> Grasp | None:
    """Find the best grasp of an object.

    Good are grasps with much surface under both pads, across the narrow side, near the middle of the object, and
    with little turning of the wrist, in that order.

    Args:
        target: the object.
        obstacles: everything else.
        shoulder: (3,) position of the arm's shoulder [m]; what it cannot reach is no grasp.
        home_yaw: direction in which turning the wrist is least [rad].
        avoid: grasps that failed before.

    Returns:
        A grasp; None if the object cannot be held from above.
    """
    points = target.points(_SPACING)
    centre = (target.centres * target.half_sizes.prod(axis=1, keepdims=True)).sum(axis=0)
    centre /= target.half_sizes.prod(axis=1).sum()
    extent = float(np.linalg.norm(points - centre, axis=1).max())
    everything = target + obstacles.near(centre, centre, extent + 0.12)
    best: Grasp | None = None
    for yaw in np.arange(_NUM_YAWS) * np.pi / _NUM_YAWS:
        positions, costs = _pad_contacts(points, centre, float(yaw))
        turn = abs((yaw - home_yaw + np.pi / 2) % np.pi - np.pi / 2)
        slack = arm_slack(positions, shoulder)
        costs = costs + 0.1 * turn + np.where(slack > 0, 10.0 * (0.04 - slack).clip(min=0), np.inf)
        for failed in avoid:
            costs = costs + 2.0 * (np.linalg.norm(positions - failed.position, axis=1) < 0.015)
        order = np.argsort(costs, kind="stable")
        for batch in np.split(order, range(_BATCH, len(order), _BATCH)):
            # Room is worth a worse grip, but not any. Costs ascend: beyond this, no room makes up for them.
            if not len(batch) or costs[batch[0]] - _ROOM_VALUE * _ROOM >= (np.inf if best is None else best.cost):
                break
            room = clearance(positions[batch], float(yaw), everything)
            total = np.where(room > 0, costs[batch] - _ROOM_VALUE * room.clip(max=_ROOM), np.inf)
            chosen = int(np.argmin(total))
            if total[chosen] < (np.inf if best is None else best.cost):
                best = Grasp(positions[batch[chosen]], float(yaw), float(total[chosen]))
    return best


def arm_slack(positions: Array, shoulder: Array) -> Array:
    """How much of the arm's length is left with the hand straight down.

    Args:
        positions: (P, 3) of the grip site [m].
        shoulder: (3,) position of the arm's shoulder [m].

    Returns:
        (P,) [m]; negative where the hand cannot come.
    """
    outwards = positions - shoulder
    distance = np.linalg.norm(outwards[:, :2], axis=1)
    return _ARM_LENGTH - np.hypot(distance - _WRIST_INSET, outwards[:, 2] + _WRIST_HEIGHT)


def _pad_contacts(points: Array, centre: Array, yaw: float) -> tuple[Array, Array]:
    """Positions (P, 3) at which closing along `yaw` brings both pads onto the object, and their costs (P,)."""
    to_hand = _to_hand(yaw)
    local = (points - centre) @ to_hand.T
    (y_low, z_low), (y_high, z_high) = local[:, 1:].min(axis=0), local[:, 1:].max(axis=0)
    positions, costs = [], []
    for y in np.arange(y_low, y_high + _GRID, _GRID):
        slab = local[np.abs(local[:, 1] - y) < _PAD_HALF_WIDTH]
        for z in np.arange(z_low - _PAD_BOTTOM, z_high + _GRID, _GRID):
            between = slab[(slab[:, 2] > z + _PAD_BOTTOM) & (slab[:, 2] < z + _PAD_TOP)]
            for part in _clusters(between):
                x_low, x_high = part[:, 0].min(), part[:, 0].max()
                width = x_high - x_low
                if width > _WIDEST:
                    continue
                area = min(_patch(part[part[:, 0] < x_low + _GIVE]), _patch(part[part[:, 0] > x_high - _GIVE]))
                if area < _LEAST_AREA:
                    continue
                position = np.array([(x_low + x_high) / 2, y, z])
                # What hangs below the fingers does not tip; what hangs beside them does.
                offset = np.linalg.norm(position[:2]) + 0.3 * abs(z)
                positions.append(position)
                costs.append(5.0 * width + 4.0 * offset - area)
    if not positions:
        return np.empty((0, 3)), np.empty(0)
    return np.array(positions) @ to_hand + centre, np.array(costs)


def _clusters(points: Array) -> list[Array]:
    """Split along x wherever there is nothing for more than the thickness of a finger."""
    if not len(points):
        return []
    ordered = points[np.argsort(points[:, 0])]
    return np.split(ordered, np.flatnonzero(np.diff(ordered[:, 0]) > _FINGER_THICKNESS) + 1)


def _patch(points: Array) -> float:
    """Share of a pad that points (P, 3) on one side of the object cover."""
    height, width = np.ptp(points[:, 2]), np.ptp(points[:, 1])
    return float(height * width / ((_PAD_TOP - _PAD_BOTTOM) * 2 * _PAD_HALF_WIDTH))
