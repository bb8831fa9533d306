"""The forward pass of any schedule: what validation runs over the stages where training has put them."""

from heapq import heappop, heappush

from dualpipe.program import Compute, Op, Program, Work


def forward_only(like: Program, microbatches: int) -> Program:
    """The forwards alone of ``microbatches`` micro-batches, over the routes of ``like``.

    The order is that of forwards of one length and free messages, when every rank runs what has come furthest of what
    has reached it: a rank idles only while nothing is there, and no micro-batch is overtaken by a later one of its
    route. Raises ValueError unless the routes can share the micro-batches out evenly.
    """
    routes = len(like.routes)
    if microbatches < 1 or microbatches % routes:
        raise ValueError(f"microbatches={microbatches} of a forward pass must be a positive multiple of {routes}")
    program = Program(f"{like.schedule}-forward", microbatches, like.routes, ((),) * like.ranks)
    ready: list[list[tuple[int, int]]] = [[] for _ in range(like.ranks)]  # heaps of (-stage, micro-batch)
    for microbatch in range(microbatches):
        heappush(ready[program.rank_of(Work(0, microbatch))], (0, microbatch))
    order: list[list[Compute]] = [[] for _ in range(like.ranks)]
    while any(ready):
        ran = []
        for rank, works in enumerate(ready):
            if works:
                stage, microbatch = heappop(works)
                ran.append(Work(-stage, microbatch))
                order[rank].append(Compute(Op.FORWARD, ran[-1]))
        for work in ran:
            if work.stage + 1 < like.stages:
                following = Work(work.stage + 1, work.microbatch)
                heappush(ready[program.rank_of(following)], (-following.stage, following.microbatch))
    return Program(program.schedule, microbatches, program.routes, tuple(map(tuple, order)))
