"""What a small model is made of."""

from __future__ import annotations

from dataclasses import dataclass

NANO_TASKS = (
    *(
        f"libero_object/pick_up_the_{thing}_and_place_it_in_the_basket"
        for thing in ("alphabet_soup", "butter", "chocolate_pudding", "ketchup", "bbq_sauce")
    ),
    *(
        f"libero_spatial/pick_up_the_black_bowl_{where}_and_place_it_on_the_plate"
        for where in ("on_the_stove", "next_to_the_cookie_box", "from_table_center")
    ),
)
"""What the model that comes with this package was trained on."""


class NanoError(ValueError):
    """Settings that no small model can be made with."""


@dataclass(frozen=True)
class NanoSettings:
    """What a small model is made of.

    Attributes:
        tasks: each as SUITE/NAME, with a scripted expert unless there are demonstrations.
        episodes: demonstrations of each task.
        tokenizer_steps: optimizer steps of the image tokenizer; 0 for the recipe's.
        steps: optimizer steps of the model; 0 for the recipe's.
        sample_episodes: episodes of the small data set that comes with the package.
        evaluate_episodes: fixed initial states of each task that the model is tried on.

    Raises:
        NanoError: a value is out of range, or a task is not of the form SUITE/NAME.
    """

    tasks: tuple[str, ...] = NANO_TASKS
    episodes: int = 50
    tokenizer_steps: int = 0
    steps: int = 0
    sample_episodes: int = 10
    evaluate_episodes: int = 20

    def __post_init__(self) -> None:
        for name in ("episodes", "sample_episodes", "evaluate_episodes"):
            if getattr(self, name) < 1:
                raise NanoError(f"{name} is {getattr(self, name)}; allowed: 1 and above")
        for name in ("tokenizer_steps", "steps"):
            if getattr(self, name) < 0:
                raise NanoError(f"{name} is {getattr(self, name)}; allowed: 0 and above")
        for task in self.tasks:
            if task.count("/") != 1:
                raise NanoError(f"task is {task!r}; allowed: SUITE/NAME, such as {NANO_TASKS[0]}")
        if not self.tasks:
            raise NanoError("no task; at least one is needed")
