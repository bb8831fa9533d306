"""The sizes that schedules can run: one wording for every rule, by the keys of the configuration."""


def check_ranks(schedule: str, ranks: int, even: bool = False) -> None:
    """Raises ValueError unless there is a rank and, where the schedule needs halves, one or an even number of them."""
    if ranks < 1:
        raise ValueError(f"layout.pipeline={ranks} must be at least 1")
    if even and ranks > 1 and ranks % 2:
        raise ValueError(f"layout.pipeline={ranks} must be 1 or even for schedule {schedule}")


def check_microbatches(
    schedule: str, microbatches: int, least: int, rule: str = "", multiple: int = 1, multiple_rule: str = "even"
) -> None:
    """Raises ValueError unless there are ``least`` micro-batches, for which ``rule`` is the formula, and they come in
    multiples of ``multiple``, in words ``multiple_rule``."""
    if microbatches >= least and microbatches % multiple == 0:
        return
    shape = "" if multiple == 1 else f"{multiple_rule} and "
    bound = f"{rule} ({least})" if rule else str(least)
    raise ValueError(
        "the number of micro-batches (train.global_batch_size / (layout.data x train.micro_batch_size)) = "
        f"{microbatches} must be {shape}at least {bound} for schedule {schedule}"
    )
