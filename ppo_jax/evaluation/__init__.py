"""Comparison of policies, judged; and the report.

`evaluate` samples from each policy and asks judges, `statistics` has win rates and intervals,
`report` draws a run. Imports `training` and below. Start with `evaluate`.
"""
