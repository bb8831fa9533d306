"""Several nodes that train one run: who takes part, which attempt they are in, and how the last one ended.

roster.py        the state that all nodes share, and its rules: no file, no clock
roster_file.py   that state in the run's folder, one node at a time
member.py        a node's side: it beats, looks whether the others do, and waits for what it needs
reach.py         which nodes reach each other, and who goes on when not all do
smaller.py       the layout that fewer nodes train
stuck.py         what the ranks of a node do in a hang, for the other nodes
rendezvous.py    what torch's agent asks when it starts the ranks of an attempt
"""
