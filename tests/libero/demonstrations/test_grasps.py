import numpy as np
import pytest

from worldvla_libero.demonstrations.grasps import (
    _PARTS,
    FINGERTIP,
    Grasp,
    arm_slack,
    clearance,
    hand_rotation,
    plan_grasp,
)
from worldvla_libero.demonstrations.scene import Boxes

TABLE = Boxes(np.array([[0.5, 0.0, -0.05]]), np.eye(3)[None], np.array([[0.5, 0.5, 0.05]]))
SHOULDER = np.array([0.0, 0.0, 0.33])
HERE = np.array([0.5, 0.0, 0.0])


def about_z(angle):
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])


def carton(size, at=HERE, angle=0.0):
    """One box of a size, standing on the table."""
    half = np.asarray(size) / 2
    return Boxes((at + (0, 0, half[2]))[None], about_z(angle)[None], half[None])


def bowl(radius=0.047, at=HERE):
    """Upright slats around a bottom."""
    angles = np.arange(20) * np.pi / 10
    walls = np.stack([np.cos(angles) * radius, np.sin(angles) * radius, np.full(20, 0.03)], axis=1) + at
    axes = np.stack([about_z(angle) for angle in angles])
    slats = Boxes(walls, axes, np.broadcast_to((0.0013, 0.0093, 0.028), (20, 3)).copy())
    return slats + carton((0.06, 0.06, 0.006), at)


def rotation(rng):
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q * np.sign(np.linalg.det(q))


def test_clearance_is_negative_exactly_where_shapes_overlap_and_never_more_than_the_distance():
    """Against a brute-force search over points of both shapes."""
    rng = np.random.default_rng(0)
    touching = 0
    for _ in range(60):
        obstacle = Boxes(rng.uniform(-0.12, 0.12, (1, 3)), rotation(rng)[None], rng.uniform(0.01, 0.05, (1, 3)))
        position, yaw = rng.uniform(-0.1, 0.1, 3), rng.uniform(0, np.pi)
        room = clearance(position[None], yaw, obstacle)[0]
        nearest = np.inf
        for centre, half in _PARTS:
            part = Boxes((position + about_z(yaw) @ centre)[None], about_z(yaw)[None], np.array([half]))
            # Points of the obstacle in the part's frame: their distance to it is exact.
            local = (obstacle.points(0.002) - part.centres[0]) @ part.axes[0]
            outside = np.linalg.norm((np.abs(local) - half).clip(min=0), axis=1)
            above = part.bottoms[0] > obstacle.tops[0] + 0.003  # below the part: no obstacle to it
            nearest = min(nearest, np.inf if above else outside.min())
        touching += nearest == 0
        assert room <= nearest + 1e-9
        if nearest > 0.004:  # the grid of points is no finer
            assert room > 0
    assert 10 < touching < 50  # both cases were met


def test_nothing_in_the_way_is_infinite_clearance():
    nothing = TABLE[np.array([False])]
    assert clearance(np.zeros((2, 3)), 0.0, nothing).tolist() == [np.inf, np.inf]


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.0, 1.5])
def test_a_carton_is_held_across_its_narrow_side(angle):
    grasp = plan_grasp(carton((0.08, 0.04, 0.05), angle=angle), TABLE, SHOULDER)
    across = (angle + np.pi / 2) % np.pi
    assert abs((grasp.yaw - across + np.pi / 2) % np.pi - np.pi / 2) < np.radians(8)
    assert np.linalg.norm(grasp.position[:2] - HERE[:2]) < 0.01
    assert grasp.position[2] + FINGERTIP > 0


def test_a_bowl_is_held_by_its_rim():
    grasp = plan_grasp(bowl(), TABLE, SHOULDER)
    outwards = (grasp.position - HERE)[:2]
    assert abs(np.linalg.norm(outwards) - 0.047) < 0.006
    # It closes through the wall, from inside to outside.
    assert abs(np.cos(grasp.yaw) * outwards[0] + np.sin(grasp.yaw) * outwards[1]) > 0.04


def test_the_hand_keeps_clear_of_a_neighbour():
    """Cream cheese beside a can that the hand would hit: LIBERO-Object's hardest case."""
    box, can = carton((0.08, 0.042, 0.018)), carton((0.06, 0.06, 0.075), HERE + (0.04, 0.105, 0))
    alone, beside = plan_grasp(box, TABLE, SHOULDER), plan_grasp(box, TABLE + can, SHOULDER)
    assert clearance(alone.position[None], alone.yaw, can)[0] < 0
    assert clearance(beside.position[None], beside.yaw, can)[0] > 0.002


def test_what_is_too_wide_or_too_far_cannot_be_held():
    assert plan_grasp(carton((0.09, 0.09, 0.05)), TABLE, SHOULDER) is None
    far = HERE + (0.4, 0, 0)
    assert plan_grasp(carton((0.04, 0.04, 0.05), far), TABLE, SHOULDER) is None
    assert arm_slack(np.array([HERE, far]), SHOULDER) @ (1, 0) > 0 > arm_slack(far[None], SHOULDER)[0]


def test_a_grasp_that_failed_is_not_tried_again():
    first = plan_grasp(bowl(), TABLE, SHOULDER)
    second = plan_grasp(bowl(), TABLE, SHOULDER, avoid=[first])
    assert np.linalg.norm(first.position - second.position) > 0.015


def test_the_hand_looks_down_and_is_right_handed():
    turned = Grasp(HERE, 0.7, 0.0).rotation
    np.testing.assert_allclose(turned @ turned.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(turned) == pytest.approx(1)
    np.testing.assert_allclose(turned[:, 2], (0, 0, -1))
    np.testing.assert_allclose(turned, hand_rotation(turned[:, 0], turned[:, 2]))
