"""Demonstrations → token shards: list, load, tokenize, split and bound, write, describe."""

from worldvla_libero.prepare.parts import PART_SUFFIX
from worldvla_libero.prepare.planning import Plan, PrepareSettings, plan
from worldvla_libero.prepare.preparation import prepare
from worldvla_libero.prepare.sources import (
    USUAL_CAMERAS,
    PrepareError,
    choose_camera,
    load_image_tokenizer,
    open_source,
)

__all__ = [
    "PART_SUFFIX",
    "USUAL_CAMERAS",
    "Plan",
    "PrepareError",
    "PrepareSettings",
    "choose_camera",
    "load_image_tokenizer",
    "open_source",
    "plan",
    "prepare",
]
