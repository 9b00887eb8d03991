"""Whether scenes are at rest when the policy takes over.

LIBERO's initial states hold objects above where they belong; a policy's first frame comes ten control steps later.
MuJoCo 3.4 changed how boxes touch, and with it where the bowl of LIBERO-Spatial's task 5 ends, which is made of
boxes and dropped onto a ramekin of boxes (LIBERO#141, lerobot#4390, RLinf#1460). The same version throws up what
stands within the table of the living room.

Speeds of the fastest object after the ten steps [mm/s], and where it then is from its initial state [mm: beside,
above], of the first two or three initial states:

| task | MuJoCo 3.2.7 | 3.4.0, 3.8.1 | 3.17.0 |
|---|---|---|---|
| LIBERO-Spatial 5, the bowl on the ramekin | 0.1 (15, -146) | 59 (37, -137) | 140 (62, -139) |
| LIBERO-10 0, 1, 7 and LIBERO-90 48, 52, 56: ketchup, milk, juice | 0.0 | 1629 (0, 412) | 1629 (0, 412) |
| LIBERO-Spatial 0 and 8, third state: the bowl pushes the plate | 0.1 (52, -71) | | 0.1 (63, -72) |
| all others of LIBERO-Spatial, -Object, -Goal and -10; every fourth of -90 | | | 0.0 |

With 3.3.7 the first two are at rest, as with 3.2.7.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from worldvla_libero.simulator.settling import MAX_SPEED, FreeObjects, Motion, unsettled
from worldvla_libero.simulator.simulator import NO_MOTION

HINGE, FREE = 3, 0


def scene(*joints: tuple[str, int, list[float], list[float]]) -> SimpleNamespace:
    """A simulation of these joints, with positions and velocities of each."""
    widths = [(len(places), len(speeds)) for _, _, places, speeds in joints]
    starts = np.cumsum([(0, 0), *widths], axis=0)
    return SimpleNamespace(
        model=SimpleNamespace(
            joint_names=tuple(name for name, *_ in joints),
            jnt_type=np.array([kind for _, kind, *_ in joints]),
            jnt_qposadr=starts[:-1, 0],
            jnt_dofadr=starts[:-1, 1],
        ),
        data=SimpleNamespace(
            qpos=np.concatenate([places for *_, places, _ in joints]),
            qvel=np.concatenate([speeds for *_, speeds in joints]),
        ),
    )


def test_only_what_nothing_holds_is_looked_at():
    turned = [1.0, 0, 0, 0]
    before = scene(
        ("robot0_joint1", HINGE, [0.5], [0.0]),
        ("bowl_1_joint0", FREE, [0.1, 0.2, 1.0, *turned], [0.0] * 6),
        ("drawer_slide", HINGE, [0.0], [0.0]),
        ("plate_1_joint0", FREE, [0.0, 0.0, 0.9, *turned], [0.0] * 6),
    )
    after = scene(
        ("robot0_joint1", HINGE, [0.9], [3.0]),
        ("bowl_1_joint0", FREE, [0.13, 0.24, 0.9, *turned], [0.0, 0.0, -0.2, 9.0, 9.0, 9.0]),
        ("drawer_slide", HINGE, [0.1], [1.0]),
        ("plate_1_joint0", FREE, [0.0, 0.0, 0.5, *turned], [0.0] * 6),
    )
    motions = FreeObjects.of(after).since(FreeObjects.of(before))
    assert [motion.name for motion in motions] == ["bowl_1", "plate_1"]
    measured = [(motion.slide, motion.rise, motion.speed) for motion in motions]
    np.testing.assert_allclose(measured, [(0.05, -0.1, 0.2), (0, -0.4, 0)], atol=1e-12)
    assert unsettled(motions) == "bowl_1 moves at 200 mm/s, 50 mm beside and 100 mm below its initial state"
    assert unsettled(motions[1:]) is None
    assert unsettled(()) is None


@pytest.mark.parametrize(
    ("speed", "at_rest"),
    [
        (0.0, True),
        (MAX_SPEED, True),
        (np.nextafter(MAX_SPEED, 1), False),
        (1.6, False),
        (np.inf, False),
        (np.nan, False),  # a scene that fell apart
    ],
)
def test_what_counts_as_rest(speed, at_rest):
    far = Motion("cup", 0.06, 0.5, speed)  # that it went far tells nothing
    assert far.at_rest == at_rest
    assert (unsettled([far]) is None) == at_rest


def test_a_reset_measures_its_settling(simulator):
    start = simulator.reset(0, observe=False)
    assert {motion.name for motion in start.settling} == set(simulator.environment.objects_dict)
    assert unsettled(start.settling) is None
    assert simulator.step(NO_MOTION, observe=False).settling == ()
    # The same state, but for a bowl that is thrown up.
    model, state = simulator.environment.sim.model, simulator.initial_states[0].copy()
    (bowl,) = (i for i, name in enumerate(model.joint_names) if name == "akita_black_bowl_1_joint0")
    state[1 + model.nq + model.jnt_dofadr[bowl] + 2] = 4.0  # m/s upwards
    told = unsettled(simulator.reset(state, observe=False).settling)
    assert told is not None
    assert told.startswith("akita_black_bowl_1 moves at ")
