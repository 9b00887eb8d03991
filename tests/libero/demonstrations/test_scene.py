import numpy as np
import pytest

from worldvla_libero.demonstrations.scene import Boxes, Scene


@pytest.fixture(scope="module")
def scene(simulator):
    simulator.reset(0, seed=0, observe=False)
    return Scene(simulator)


def test_boxes_know_their_extent_and_fill():
    turn = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])  # by 90° about z
    box = Boxes(np.array([[1.0, 2, 3]]), turn[None], np.array([[0.1, 0.2, 0.3]]))
    assert box.tops == pytest.approx([3.3])
    assert box.bottoms == pytest.approx([2.7])
    points = box.points(0.05)
    np.testing.assert_allclose(np.ptp(points, axis=0), (0.4, 0.2, 0.6))
    np.testing.assert_allclose(points.mean(axis=0), (1, 2, 3))
    assert len(box + box) == 2
    line = np.array([0.0, 0, 0]), np.array([2.0, 0, 0])
    assert len(box.near(*line, 1.95)) == 1
    assert len(box.near(*line, 1.85)) == 0


def test_shapes_stand_on_the_table(scene):
    for name in ("akita_black_bowl_1", "cream_cheese_1", "plate_1"):
        boxes = scene.boxes(name)
        assert boxes.bottoms.min() == pytest.approx(0.9, abs=0.004)
        assert np.abs(boxes.centres.mean(axis=0) - scene.position(name)).max() < 0.03
    everything = scene.obstacles()
    assert len(everything) - len(scene.obstacles("plate_1")) == len(scene.boxes("plate_1"))
    assert everything.centres[:, 2].min() < 0 < 1 < everything.tops.max()  # from the floor to the rack


def test_surfaces_of_objects_and_regions(scene):
    plate = scene.surface("plate_1")
    assert scene.position("plate_1")[2] < plate[2] < scene.boxes("plate_1").tops.max()
    top = scene.surfaces("wooden_cabinet_1_top_side")
    np.testing.assert_allclose(top[:, 2], scene.boxes("wooden_cabinet_1").tops.max(), atol=0.005)
    towards_robot = np.linalg.norm((top - scene.shoulder)[:, :2], axis=1)
    assert (np.diff(towards_robot) < 0).all()


def test_a_drawer_slides_out_of_the_cabinet(simulator, scene):
    drawer = scene.drawer("wooden_cabinet_1_middle_region")
    sim = simulator.environment.sim
    before = sim.get_state()
    sim.data.set_joint_qpos("wooden_cabinet_1_middle_level", -0.15)
    sim.forward()
    moved = scene.drawer("wooden_cabinet_1_middle_region").boxes.centres - drawer.boxes.centres
    np.testing.assert_allclose(moved, np.broadcast_to(0.15 * drawer.direction, moved.shape), atol=0.005)
    assert scene.holds(["open", "wooden_cabinet_1_middle_region"])
    sim.set_state(before)  # for the tests after this one
    sim.forward()
    assert not scene.holds(["open", "wooden_cabinet_1_middle_region"])
    assert scene.drawer("plate_1") is None


def test_a_knob_turns_about_the_vertical(scene):
    knob = scene.knob("flat_stove_1")
    assert np.abs(knob.direction) @ (0, 0, 1) == pytest.approx(1)
    assert len(knob.boxes) < len(scene.boxes("flat_stove_1"))


def test_goal_and_hand(scene):
    assert scene.goal == [["open", "wooden_cabinet_1_middle_region"]]
    assert not scene.holds(scene.goal[0])
    assert 0.07 < scene.opening < 0.081
    np.testing.assert_allclose(scene.rotation @ scene.rotation.T, np.eye(3), atol=1e-9)
    assert scene.rotation[2, 2] < -0.99  # looks down
