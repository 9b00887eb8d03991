"""Pages for people: of evaluations and world-model runs side by side, and of token data sets."""

from worldvla_libero.evaluation.report.run_report import write_report

__all__ = ["write_report"]
