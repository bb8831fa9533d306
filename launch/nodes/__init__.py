"""Several nodes that train one run: who takes part, which attempt they are in, and how the last one ended.

roster.py        the state that all nodes share, and its rules: no file, no clock
roster_file.py   that state in the run's folder, one node at a time
member.py        a node's side: it beats, looks whether the others do, and waits for what it needs
rendezvous.py    what torch's agent asks when it starts the ranks of an attempt
"""
