"""Cost analysis of compiled programs: flops, bytes, collectives, trip counts.

`text` parses HLO, `trip_counts` finds those of loops, `instructions` has the cost of each
instruction, `cost` adds them up. Imports nothing of this library. Start with `cost`.
"""
