"""A run from its data to its report.

`run` goes through the stages, `preflight` refuses mistakes before anything is trained, `preview` is
the dry run, `summary` the table at the start, `export` writes Hugging Face folders. Of a sweep,
`study` plans the points, `sweep` runs them as `children`, `shared_stages` makes what they have in
common, `search` proposes points, `sweep_files` writes the table.
Imports everything but `planner`. Start with `run`.
"""
