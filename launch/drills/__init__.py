"""Faults as data, the scenarios made of them, and the verdict: what ``dualpipe drill`` does to a run, and how it judges
what the run made of it.

fault.py      what breaks, in which rank, at which point of which step; a plan of them is a file
inject.py     the rank's side: faults that happen where the plan says
damage.py     what a disk does to a checkpoint
scenarios.py  what is drilled
drive.py      starts the run of a scenario, breaks it, watches it and leaves nothing behind
verdict.py    the scenario's run against one that nobody disturbed
"""
