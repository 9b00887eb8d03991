"""Demonstrations in HDF5: LIBERO's layout, and what others made of it, read; LIBERO's layout written."""

from worldvla_libero.hdf5.layouts import FileInUseError
from worldvla_libero.hdf5.reader import CONTROL_HZ, SUFFIXES, HDF5Source
from worldvla_libero.hdf5.writer import merge_demonstrations, write_demonstrations

__all__ = [
    "CONTROL_HZ",
    "SUFFIXES",
    "FileInUseError",
    "HDF5Source",
    "merge_demonstrations",
    "write_demonstrations",
]
