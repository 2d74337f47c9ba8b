"""The report of a run: one HTML page, its charts, and the model card.

`report` assembles the page, `charts` says which charts, `plots` draws them, `summary` reads the run
and gives its verdict. Imports `training` and below. Start with `report`.
"""
