"""What the user can do wrong between a recipe and a cluster."""


class SlurmError(ValueError):
    """A Slurm setting, a missing Slurm, or a refusal by Slurm; the message says what, where and what to do."""

    exit_status = 2
