"""`idc bench`: what training, generation, alignment and data cost here, against what a user would otherwise run.

Random weights of the real sizes: nothing is downloaded, and the arithmetic does not know. Peers run in the same process
and in turns with us, so that clocks, heat and neighbours are those of both. Every time is a median of repeats with
its quartiles; a ratio is one a round, with the spread over rounds.
"""
