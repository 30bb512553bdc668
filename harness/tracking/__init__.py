"""A mirror of the records in wandb. Records are the truth: nothing that wandb shows is ever read back."""

from harness.tracking.results import log_figures
from harness.tracking.runs import log_record, mirrored

__all__ = ["log_figures", "log_record", "mirrored"]
