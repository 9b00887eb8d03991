"""What a scripted demonstrator may know and a policy may not: poses, shapes, joints and the goal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worldvla_libero.simulator.simulator import Simulator

Array = NDArray[np.float64]

_FLOOR = (3.0, 3.0, 0.01)  # half sizes of the box that stands for an endless plane [m]


@dataclass(frozen=True, eq=False)
class Boxes:
    """Oriented boxes.

    Attributes:
        centres: (N, 3) in the world [m].
        axes: (N, 3, 3) rotations; the columns are the directions of a box's edges.
        half_sizes: (N, 3) [m].
    """

    centres: Array
    axes: Array
    half_sizes: Array

    def __len__(self) -> int:
        return len(self.centres)

    def __getitem__(self, chosen: NDArray[np.bool_]) -> Boxes:
        return Boxes(self.centres[chosen], self.axes[chosen], self.half_sizes[chosen])

    def __add__(self, other: Boxes) -> Boxes:
        return Boxes(
            np.concatenate([self.centres, other.centres]),
            np.concatenate([self.axes, other.axes]),
            np.concatenate([self.half_sizes, other.half_sizes]),
        )

    @property
    def tops(self) -> Array:
        """(N,) height of each box's highest point [m]."""
        return self.centres[:, 2] + self._extents[:, 2]

    @property
    def bottoms(self) -> Array:
        """(N,) height of each box's lowest point [m]."""
        return self.centres[:, 2] - self._extents[:, 2]

    @property
    def _extents(self) -> Array:
        """(N, 3) half sizes of the axis-aligned boxes around them."""
        return np.einsum("nij,nj->ni", np.abs(self.axes), self.half_sizes)

    def near(self, start: Array, end: Array, distance: float) -> Boxes:
        """Those within a horizontal distance [m] of the line from one (2+,) position to another."""
        # Sampling the line keeps the question one of points and upright rectangles around the boxes.
        line = np.linspace(start[:2], end[:2], 20)  # (20, 2)
        outside = np.abs(line[:, None] - self.centres[:, :2]) - self._extents[:, :2]  # (20, N, 2)
        return self[(np.linalg.norm(outside.clip(min=0), axis=-1) < distance).any(axis=0)]

    def points(self, spacing: float) -> Array:
        """(P, 3) grid of points that fills them, at most `spacing` [m] apart."""
        filled = []
        for centre, axes, half in zip(self.centres, self.axes, self.half_sizes, strict=True):
            sides = [np.linspace(-h, h, int(np.ceil(2 * h / spacing)) + 1) for h in half]
            grid = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, 3)
            filled.append(grid @ axes.T + centre)
        return np.concatenate(filled)


@dataclass(frozen=True, eq=False)
class Joint:
    """A part of an appliance that moves.

    Attributes:
        anchor: (3,) a point on its axis [m].
        direction: (3,) unit vector along which it slides open, or about which it turns on.
        boxes: its shape.
        others: the shape of everything else but the robot.
    """

    anchor: Array
    direction: Array
    boxes: Boxes
    others: Boxes


class Scene:
    """A simulator's present state, read when it is asked for.

    Args:
        simulator: the task, reset.
    """

    def __init__(self, simulator: Simulator) -> None:
        self._environment = simulator.environment
        self._robot = self._root(self._model.body_name2id(self._environment.robots[0].robot_model.root_body))

    @property
    def _model(self) -> Any:
        return self._environment.sim.model

    @property
    def _data(self) -> Any:
        return self._environment.sim.data

    def _root(self, body: int) -> int:
        return int(self._model.body_rootid[body])

    @property
    def goal(self) -> list[list[str]]:
        """Predicates of the BDDL file with their arguments, such as ['in', 'ketchup_1', 'basket_1_…']."""
        return self._environment.parsed_problem["goal_state"]

    def holds(self, predicate: Sequence[str]) -> bool:
        """Whether a predicate is true now, by LIBERO's own judgement."""
        return bool(self._environment._eval_predicate(predicate))

    @property
    def hand(self) -> Array:
        """(3,) position of the grip site [m]."""
        return self._data.get_site_xpos(self._environment.robots[0].controller.eef_name).copy()

    @property
    def rotation(self) -> Array:
        """(3, 3) rotation of the grip site."""
        return self._data.get_site_xmat(self._environment.robots[0].controller.eef_name).copy()

    @property
    def opening(self) -> float:
        """Distance between the finger pads [m]."""
        return float(np.abs(self._data.qpos[self._environment.robots[0]._ref_gripper_joint_pos_indexes]).sum())

    @property
    def shoulder(self) -> Array:
        """(3,) position of the arm's second joint [m]."""
        return self._data.body_xpos[self._model.body_name2id("robot0_link2")].copy()

    def position(self, name: str) -> Array:
        """(3,) position of an object [m]."""
        return self._data.body_xpos[self._environment.obj_body_id[name]].copy()

    def boxes(self, name: str) -> Boxes:
        """Shape of an object."""
        return self._boxes(self._model.body_rootid == self._root(self._environment.obj_body_id[name]))

    def obstacles(self, *without: str) -> Boxes:
        """Shape of everything but the robot and some objects."""
        left_out = [self._robot, *(self._root(self._environment.obj_body_id[name]) for name in without)]
        return self._boxes(~np.isin(self._model.body_rootid, left_out))

    def _boxes(self, bodies: NDArray[np.bool_]) -> Boxes:
        return collision_boxes(self._environment.sim, np.flatnonzero(bodies[self._model.geom_bodyid]))

    def surface(self, region: str) -> Array:
        """(3,) middle of the surface [m] of an object or a region, on which things can be put down."""
        return self.surfaces(region)[0]

    def surfaces(self, region: str) -> Array:
        """(P, 3) places on a surface [m], from its middle towards the robot."""
        site = self._environment.object_sites_dict.get(region)
        if site is None:
            position = self.position(region)
            points = self.boxes(region).points(0.004)
            position[2] = points[np.linalg.norm((points - position)[:, :2], axis=1) < 0.015, 2].max()
            return position[None]
        middle = self._data.get_site_xpos(region).copy()
        half_size = np.abs(self._data.get_site_xmat(region) @ site.size)
        middle[2] -= half_size[2]  # a region to put things in reaches down to its floor; others are flat
        way = (self.shoulder - middle)[:2]
        edge = float(np.min(half_size[:2] / np.maximum(np.abs(way), 1e-6)))
        return middle + np.outer(np.linspace(0, 0.7 * edge, 8), [*way, 0.0])

    def drawer(self, region: str) -> Joint | None:
        """The drawer that a region is the inside of."""
        site = self._environment.object_sites_dict.get(region)
        return self._joint(site.joints[-1]) if site is not None and site.joints else None

    def knob(self, fixture: str) -> Joint:
        """The knob of an appliance."""
        return self._joint(self._environment.get_object(fixture).joints[-1])

    def _joint(self, name: str) -> Joint:
        joint = self._model.joint_name2id(name)
        low, high = self._model.jnt_range[joint]
        sign = 1.0 if high > -low else -1.0
        mine = np.arange(self._model.nbody) == self._model.jnt_bodyid[joint]
        others = self._boxes(~mine & (self._model.body_rootid != self._robot))
        return Joint(self._data.xanchor[joint].copy(), sign * self._data.xaxis[joint], self._boxes(mine), others)


def collision_boxes(sim: Any, geoms: Iterable[int]) -> Boxes:
    """The boxes around collision geoms: exact for boxes, which LIBERO's objects are made of.

    Args:
        sim: robosuite's simulation.
        geoms: ids of geoms; those that collide with nothing are left out.
    """
    import mujoco

    model, data = sim.model, sim.data
    solid = [g for g in geoms if model.geom_contype[g] or model.geom_conaffinity[g]]
    axes = data.geom_xmat[solid].reshape(-1, 3, 3)
    boxes = model.geom_aabb[solid]  # (N, 6): centre and half size in the geom's frame
    centres, half_sizes = boxes[:, :3].copy(), boxes[:, 3:].copy()
    plane = model.geom_type[solid] == mujoco.mjtGeom.mjGEOM_PLANE  # a plane has no box of its own
    half_sizes[plane] = _FLOOR
    centres[plane] = (0.0, 0.0, -_FLOOR[2])
    return Boxes(data.geom_xpos[solid] + np.einsum("nij,nj->ni", axes, centres), axes.copy(), half_sizes)
