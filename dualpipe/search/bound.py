"""What no order of a placement can beat."""

from dualpipe.search.timing import Pipeline


def lower_bound(pipeline: Pipeline) -> float:
    """A time that no order can beat: the first micro-batch's way to a rank, then all the rank's work without a pause,
    with as many of the best pairs as there are works."""
    p, works, empty = pipeline, pipeline.works, pipeline.empty
    arrival = [float("inf")] * empty.ranks
    for d, route in enumerate(empty.routes):
        microbatch = next(m for m in range(empty.microbatches) if empty.direction(m) == d)
        now = 0.0
        for stage, rank in enumerate(route):
            arrival[rank] = min(arrival[rank], now)
            work = stage * empty.microbatches + microbatch
            now += min(p.duration[work], *p.pair_duration[stage])
            if p.gives[work] >= 0 and (link := p.link[p.gives[work]]) >= 0:
                now += sum(p.transfer[link])
    bounds = []
    for rank in range(empty.ranks):
        own = [work for work in range(works) if p.rank_of[work] == rank]
        back = {
            work: min(p.duration[3 * works + work], p.duration[works + work] + p.duration[2 * works + work])
            for work in own
        }
        stages = {work // empty.microbatches: work for work in own}.values()
        saved = max(p.duration[f] + back[b] - p.length(p.pair(f, b)) for f in stages for b in stages)
        total = sum(p.duration[work] + back[work] for work in own)
        bounds.append(arrival[rank] + total - len(own) * max(0.0, saved))
    return max(bounds)
