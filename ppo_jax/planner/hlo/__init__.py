"""Reader of compiled programs: flops, bytes, collectives, trip counts.

`text` parses HLO, `trip_counts` counts loops, `instructions` the work of each instruction, `cost`
adds them up. Imports nothing of this library. Start with `cost`.
"""
