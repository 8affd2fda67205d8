from sonic_ep.api import ExpertParallel


def shared(group=None, **o):
    return ExpertParallel(group, **o)
