"""Comparison of policies, judged; and the report.

`evaluate` samples from each policy and asks judges, `statistics` has win rates and intervals,
`report` draws a run. Imports `inference` and below, not `training`. Start with `evaluate`.
"""
