"""LeRobotDataset v3, read as it is in the wild and written."""

from worldvla_libero.lerobot.reader import LeRobotSource, is_lerobot
from worldvla_libero.lerobot.writer import DataSetExistsError, write_lerobot

__all__ = ["DataSetExistsError", "LeRobotSource", "is_lerobot", "write_lerobot"]
